"""quantkit: from a transformers checkpoint to the quantized variant to ship, with proof."""

from quantkit.version import __version__

__all__ = ["__version__"]
