"""Formats: how weights lie on disk. Looked up by name, imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit import registry
from quantkit.models.checkpoint import FORMAT

if TYPE_CHECKING:
    from quantkit.formats.base import Format
    from quantkit.models.variant import Model


def load_format(name: str) -> Format:
    """Raise RecipeError, with the nearest name, where there is no such format."""
    found: Format
    if name == FORMAT:
        found = registry.instance("quantkit.formats.safetensors_files:Safetensors")
    else:
        found = registry.load("format", name)
    return found


def format_of(model: Model) -> Format:
    """The format that a variant has, or a checkpoint is stored in."""
    return load_format(model.format)
