"""GGUF from a checkpoint."""
