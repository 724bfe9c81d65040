"""Formats: how weights lie on disk. Looked up by name, imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit import registry

if TYPE_CHECKING:
    from quantkit.formats.base import Format

FORMATS = {
    "gguf": "quantkit.formats.gguf:GGUF",
    "gptq": "quantkit.formats.gptq:GPTQ",
    "awq": "quantkit.formats.awq:AWQ",
    "compressed-tensors": "quantkit.formats.compressed_tensors:CompressedTensors",
}


def load_format(name: str) -> Format:
    """Raise RecipeError, with the nearest name, where there is no such format."""
    format_: Format = registry.load("format", name, FORMATS)
    return format_
