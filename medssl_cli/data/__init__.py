"""Reading, checking, storing and augmenting images."""
