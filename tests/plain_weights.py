"""The weights that engines compute with, of packed checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from quantkit.formats import load_format
from quantkit.formats.base import Dequantizes
from quantkit.formats.detect import open_variant


def plain_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict of what lies at ``path``, (out, in) float32 where it was packed."""
    variant = open_variant(path)
    format_ = load_format(variant.format)
    assert isinstance(format_, Dequantizes)
    return format_.dequantize(variant)
