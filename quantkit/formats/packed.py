"""Packed checkpoints as they lie on disk, ours or others': which linears, how many bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from quantkit.checkpoint import TensorInfo

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_WORDS = (".qweight", ".weight_packed")
"""How the names of packed integers end: GPTQ and AWQ, compressed-tensors."""


def linears_of(tensors: Iterable[str]) -> list[str]:
    """Names of the packed linears, without the ends of their tensors' names."""
    return [name.rpartition(".")[0] for name in tensors if name.endswith(_WORDS)]


def tensor_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of the data of tensors."""
    return sum(math.prod(info.shape) * _BYTES[info.dtype] for info in tensors)
