"""The tensors of safetensors files: where each lies and what it is, without reading its data."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import CheckpointError
from quantkit.models import dtypes, weight_files

if TYPE_CHECKING:
    import torch

_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached|position_ids"
    r"|(attn|attention)\.masked_bias|causal_mask)$"
)
"""Buffers that old checkpoints store though they follow from the config: not parameters, and not
used."""
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
"""Likewise, where it is not a vector, as a linear's bias is."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; ``dtype`` in safetensors' words (``BF16``).

    ``stored``: its name in the shard, where that is another one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    stored: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch's words."""
        return dtypes.torch_dtype(self.dtype)

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return dtypes.stored_bytes(self.dtype, self.shape)


def tensors_in(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a directory's safetensors files, by name; raise CheckpointError where there
    are none, or damaged ones."""
    return tensors_of(weight_files.find(path).files)


def tensors_of(shards: Sequence[Path]) -> dict[str, TensorInfo]:
    """All parameters; of those that several shards hold the last, as transformers takes them."""
    found = {
        info.name: info
        for shard in shards
        for info in _index(shard)
        if not (_BUFFER.search(info.name) or (len(info.shape) != 1 and _MASK.search(info.name)))
    }
    if not found:
        raise CheckpointError(f"{shards[0].parent}: its safetensors hold no tensors")
    return found


def _index(shard: Path) -> list[TensorInfo]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="numpy") as file:  # which is there sooner than torch
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [
                TensorInfo(name, part.get_dtype(), tuple(part.get_shape()), shard)
                for name, part in slices.items()
            ]
    except SafetensorError as error:
        raise CheckpointError(
            f"{shard}: damaged or truncated safetensors ({shard.stat().st_size} bytes): {error}; "
            "download it again"
        ) from error
