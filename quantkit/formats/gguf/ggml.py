"""libggml through ctypes: its tensor types, and the functions that quantize rows into them.

The library is the one that llama-cpp-python brings. The functions let go of Python's lock.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import llama_cpp
from llama_cpp._ggml import libggml


@dataclass(frozen=True)
class TensorType:
    """A type of ggml: ``block`` values take ``bytes`` bytes."""

    name: str
    number: int
    block: int
    bytes: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; its columns must divide by the block."""
        return columns // self.block * self.bytes

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape, without padding."""
        return math.prod(shape) // self.block * self.bytes


@cache
def types() -> dict[str, TensorType]:
    """Every type of this libggml, by name in capitals: ``Q4_K``."""
    found = (
        TensorType((_name(number) or b"").decode().upper(), number, _block(number), _bytes(number))
        for number in range(llama_cpp.GGML_TYPE_COUNT)
    )
    return {kind.name: kind for kind in found if kind.bytes}  # removed ones have no size


@cache
def numbered(number: int) -> TensorType | None:
    """The type of this number; None where this libggml has none."""
    return next((kind for kind in types().values() if kind.number == number), None)


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(libggml, name)
    function.restype = result  # type: ignore[attr-defined]
    function.argtypes = arguments  # type: ignore[attr-defined]
    return function


_int, _long, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_name = _function("ggml_type_name", ctypes.c_char_p, _int)
_block = _function("ggml_blck_size", _long, _int)
_bytes = _function("ggml_type_size", ctypes.c_size_t, _int)

_quantize_chunk = _function(
    "ggml_quantize_chunk", ctypes.c_size_t, _int, _pointer, _pointer, _long, _long, _long, _pointer
)


def quantize(
    kind: TensorType, source: int, target: int, rows: int, columns: int, weights: int | None
) -> None:
    """Quantize float32 rows as ``llama-quantize`` does; all but ``kind`` and sizes are addresses.

    ``weights``: of the columns, or None. Aborts the process where blocks do not divide the columns.
    """
    if kind.name == "F16":
        _to_float16(source, target, rows * columns)
    else:
        _quantize_chunk(kind.number, source, target, 0, rows, columns, weights)


is_valid = _function("ggml_validate_row_data", ctypes.c_bool, _int, _pointer, ctypes.c_size_t)
"""(type, data, bytes): whether every block's scale is finite."""

requires_weights = _function("ggml_quantize_requires_imatrix", ctypes.c_bool, _int)
"""(type): whether ``quantize_rows`` aborts the process where it is given no weights."""

prepare = _function("ggml_quantize_init", None, _int)
"""(type): build the tables that the IQ types search, once, before threads need them."""


class _Traits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", _long),
        ("interleaved", _long),
        ("bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float32", ctypes.CFUNCTYPE(None, _pointer, _pointer, _long)),
        ("from_float32", _pointer),
    )


_traits = _function("ggml_get_type_traits", ctypes.POINTER(_Traits), _int)


def unpacker(number: int) -> Callable[[int, int, int], None]:
    """What turns data of this quantized type into float32: (source, target, values)."""
    function: Callable[[int, int, int], None] = _traits(number).contents.to_float32
    return function


def _float16(of_cpu: str, portable: str) -> Callable[..., Any]:
    """The processor has instructions for float16; the portable function gives the same, slowly."""
    name = of_cpu if hasattr(libggml, of_cpu) else portable
    return _function(name, None, _pointer, _pointer, _long)


# Fills the table by which they convert what is left of a row after its vectors; zeros without it.
if hasattr(libggml, "ggml_cpu_init"):
    _function("ggml_cpu_init", None)()

_to_float16 = _float16("ggml_cpu_fp32_to_fp16", "ggml_fp32_to_fp16_row")

TO_FLOAT32 = {
    "torch.float16": _float16("ggml_cpu_fp16_to_fp32", "ggml_fp16_to_fp32_row"),
    "torch.bfloat16": _function("ggml_bf16_to_fp32_row", None, _pointer, _pointer, _long),
}
"""(source, float32 target, values), by the source's dtype."""
