"""Pictures and the self-contained HTML page."""
