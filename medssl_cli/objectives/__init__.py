"""Losses: tensors in, named scalars out."""
