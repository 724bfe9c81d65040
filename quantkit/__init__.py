"""quantkit: from a transformers checkpoint to the quantized variant to ship, with proof."""

__version__ = "0.1.0"
