"""The dtypes of tensors in safetensors files: the size of an element, and what torch calls them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_BITS = {
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "I16": 16,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "F6_E3M2": 6,
    "F6_E2M3": 6,
    "F4": 4,
    "BOOL": 8,
}
_TORCH = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "F4": "float4_e2m1fn_x2",
    "BOOL": "bool",
}

FILE_ORDER = tuple(_BITS)
"""The order in which safetensors writes tensors into a file, by dtype."""

WEIGHTS = ("F64", "F32", "BF16", "F16")
"""What the weights of a model that is not quantized can be: values that stand for themselves."""


def stored_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor's data; raise CheckpointError for a dtype that safetensors has not."""
    if dtype not in _BITS:
        raise CheckpointError(f"unknown dtype {dtype!r}; safetensors has {', '.join(_BITS)}")
    return math.prod(shape) * _BITS[dtype] // 8


def torch_dtype(dtype: str) -> torch.dtype:
    """``BF16`` in torch's words; raise CheckpointError for one that torch does not have."""
    import torch

    found = getattr(torch, _TORCH.get(dtype, ""), None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"dtype {dtype!r} is not among those of torch {torch.__version__}")
    return found
