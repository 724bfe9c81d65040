"""Checkpoints and variants: what they are, as plain data."""
