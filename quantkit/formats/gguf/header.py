"""What a GGUF file says about itself: its metadata and its tensors' names, shapes and types.

Reads only the head of the file and needs no other package, so that opening a bare GGUF is quick.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError

ALIGNMENT = 32
"""Bytes; what ``general.alignment`` is where a file does not say."""

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9


@dataclass(frozen=True)
class TensorHeader:
    """One tensor; ``shape`` in torch's order (rows, columns), ``type`` ggml's number."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    """Bytes from the start of the data."""


@dataclass(frozen=True)
class Header:
    """The head of a GGUF file; ``data_offset`` is where the tensors' bytes begin."""

    metadata: dict[str, Any]
    tensors: tuple[TensorHeader, ...]
    data_offset: int


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """``size`` rounded up to the alignment."""
    return -(-size // alignment) * alignment


def read_header(path: Path) -> Header:
    """Raise CheckpointError where ``path`` is not a whole GGUF header of version 2 or 3."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise CheckpointError(f"{path}: not a GGUF file, or a truncated one: {error}") from error


class _Cursor:
    """A position in the file's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> Header:
        magic, version, tensor_count, field_count = self._unpack("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"starts with {magic!r}, version {version}")
        metadata = {self._string(): self._value(self._unpack("I")[0]) for _ in range(field_count)}
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        return Header(metadata, tensors, padded(self._at, alignment))

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._data, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise ValueError(f"a string of {length} bytes at {start} ends behind the file")
        return self._data[start : self._at].decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_NUMBERS[kind])[0]
        item, count = self._unpack("IQ")
        if item in _NUMBERS:
            return list(self._unpack(f"{count}{_NUMBERS[item]}"))
        return [self._value(item) for _ in range(count)]

    def _tensor(self) -> TensorHeader:
        name = self._string()
        (dimensions,) = self._unpack("I")
        shape = self._unpack(f"{dimensions}Q")
        kind, offset = self._unpack("IQ")
        return TensorHeader(name, tuple(reversed(shape)), kind, offset)
