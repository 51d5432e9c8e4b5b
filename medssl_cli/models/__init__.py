"""Networks and how their weights are named and loaded."""
