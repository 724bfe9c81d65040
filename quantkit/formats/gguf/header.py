"""What a GGUF file says about itself: its metadata and its tensors' names, shapes and types.

Reads only the head of the file and needs no other package, so that opening a bare GGUF is quick.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3). What makes
no sense to llama.cpp's own reader is refused; what it may still load is told by ``oddities.py``.
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
_MAX_DIMENSIONS = 4

_NOT_GGUF = (
    (b"lmgg", "a GGML file of before August 2023, which nothing loads any more"),
    (b"fmgg", "a GGML file of before August 2023, which nothing loads any more"),
    (b"tjgg", "a GGML file of before August 2023, which nothing loads any more"),
    (b"vers", "a pointer of git-lfs, not the file: run `git lfs pull`"),
    (b"<", "a web page, not the file: download it again"),
    (b"\0\0\0\0", "begins with zeros: its download did not finish"),
)
"""First bytes of files that are named .gguf and are something else, and what to say of each."""


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
    stored: dict[str, bytes]
    """Type and value as stored, by key."""
    tensors: tuple[TensorHeader, ...]
    data_offset: int
    version: int

    @property
    def alignment(self) -> int:
        """Bytes that each tensor's data is padded to."""
        return int(self.metadata.get("general.alignment", ALIGNMENT))


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """``size`` rounded up to the alignment."""
    return -(-size // alignment) * alignment


def read_header(path: Path) -> Header:
    """Raise CheckpointError where ``path`` is not a whole GGUF header of version 2 or 3."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except EOFError as error:
        raise CheckpointError(
            f"{path}: truncated GGUF, its {path.stat().st_size} bytes end inside its metadata or "
            "its list of tensors; download it again"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a GGUF file that can be read: {error}") from error


class _Cursor:
    """A position in the file's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> Header:
        version = self._version()
        tensor_count, field_count = self._unpack("QQ")
        metadata: dict[str, Any] = {}
        stored: dict[str, bytes] = {}
        for _ in range(field_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"key {key} occurs twice")
            start = self._at
            metadata[key] = self._value(self._unpack("I")[0])
            stored[key] = self._data[start : self._at]
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment.bit_count() != 1:
            raise ValueError(f"general.alignment is {alignment!r}, expected a power of 2")
        return Header(metadata, stored, tensors, padded(self._at, alignment), version)

    def _version(self) -> int:
        start = bytes(self._data[:4])
        if start != b"GGUF":
            known = (what for magic, what in _NOT_GGUF if start.startswith(magic))
            raise ValueError(next(known, f"it begins with {start!r}, not with b'GGUF'"))
        self._at = 4
        (version,) = self._unpack("I")
        if version & 0xFFFF == 0:
            raise ValueError(
                "it is big-endian, made for s390x and the like; gguf-py's gguf_convert_endian.py "
                "turns it into little-endian"
            )
        if version not in (2, 3):
            hint = "llama.cpp dropped it in 2023" if version == 1 else "expected 2 or 3"
            raise ValueError(f"its version is {version}; {hint}")
        return int(version)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from("<" + layout, self._data, self._at)
        except struct.error as error:  # also where a damaged count is beyond all sizes
            raise EOFError from error
        self._at += struct.calcsize("<" + layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise EOFError
        return self._data[start : self._at].decode("utf-8", errors="replace")

    def _strings(self, count: int) -> list[str]:
        """Many strings at once: a vocabulary has hundreds of thousands."""
        found, data, at, end = [], self._data, self._at, len(self._data)
        read = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                raise EOFError
            start = at + 8
            at = start + read(data, at)[0]
            if at > end:
                raise EOFError
            found.append(data[start:at].decode("utf-8", "replace"))
        self._at = at
        return found

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(self._number(kind))[0]
        item, count = self._unpack("IQ")
        if item == _STRING:
            return self._strings(count)
        return list(self._unpack(f"{count}{self._number(item)}"))

    @staticmethod
    def _number(kind: int) -> str:
        if kind not in _NUMBERS:
            raise ValueError(f"a value of type {kind}, which GGUF does not have")
        return _NUMBERS[kind]

    def _tensor(self) -> TensorHeader:
        name = self._string()
        (dimensions,) = self._unpack("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} of {dimensions} dimensions")
        shape = self._unpack(f"{dimensions}Q")
        kind, offset = self._unpack("IQ")
        return TensorHeader(name, tuple(reversed(shape)), kind, offset)
