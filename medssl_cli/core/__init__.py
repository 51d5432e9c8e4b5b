"""Errors, configuration, volumes, cases and run folders: what every floor above may import."""
