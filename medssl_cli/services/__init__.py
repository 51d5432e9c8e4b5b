"""One use case a file: build the parts, connect them, return a result."""
