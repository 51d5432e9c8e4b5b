"""Numbers from numpy arrays, each with its definition."""
