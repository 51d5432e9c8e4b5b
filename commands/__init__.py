"""The commands of medssl: options in, a few printed lines out."""
