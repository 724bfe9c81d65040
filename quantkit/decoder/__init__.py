"""A checkpoint's decoder, block by block, as transformers computes it."""
