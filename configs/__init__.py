"""Shipped recipes and rules, one YAML each."""
