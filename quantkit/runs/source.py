"""What a run or a conversion starts from: a model by its name, or a base and an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.formats.decoded import open_decoded
from quantkit.formats.detect import open_source
from quantkit.formats.merged import open_merged
from quantkit.models.checkpoint import Checkpoint
from quantkit.system.yaml_file import Section, as_value_error


class AdaptedSource(Section):
    """A LoRA adapter and the model that it is merged into."""

    base: str
    """The model that the adapter was trained on: a directory or a hub id."""
    adapter: str
    """A LoRA adapter of PEFT, in safetensors: a directory or a hub id."""


Source = str | Path | AdaptedSource


def parsed(given: Any) -> Any:
    """The value of ``source`` in a recipe; ValueError for what is none."""
    if isinstance(given, str | AdaptedSource):
        return given
    with as_value_error():
        if not isinstance(given, Mapping):
            raise RecipeError(f"is {given!r}, expected a model, or `base` and `adapter`")
        return AdaptedSource.given(given)


def open_given(given: Source, *, gguf: bool = False, allow_requantize: bool = False) -> Checkpoint:
    """A checkpoint, decoded where it is quantized, or what a merge will give (``Merged``).

    ``gguf``: whether a GGUF file can be the source. Raise CheckpointError.
    """
    if isinstance(given, AdaptedSource):
        return open_merged(given.base, given.adapter)
    if gguf:
        return open_source(given, allow_requantize=allow_requantize)
    return open_decoded(given)
