"""Where every byte of a GGUF will lie, known before a weight is read."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import gguf
from gguf import GGUFValueType as ValueType

from quantkit.formats.gguf.fields import Metadata, packed, string
from quantkit.formats.gguf.ggml import TensorType
from quantkit.formats.gguf.header import padded

if TYPE_CHECKING:
    from quantkit.producers.gguf.content import ContentTensor


class Place(NamedTuple):
    """A tensor in a file: its ``type`` there, which ``part`` it is in, and at which byte."""

    tensor: ContentTensor
    type: TensorType
    part: int
    offset: int


@dataclass(frozen=True)
class Part:
    """One file: the bytes that precede the data, and how large it is with the data."""

    header: bytes
    bytes: int


@dataclass(frozen=True)
class Layout:
    """A GGUF in one or more parts; ``places`` in file order."""

    parts: tuple[Part, ...]
    places: tuple[Place, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.bytes for part in self.parts)

    def paths(self, directory: Path, stem: str) -> list[Path]:
        """The files' names, as llama.cpp calls parts."""
        count = len(self.parts)
        if count == 1:
            return [directory / f"{stem}.gguf"]
        return [directory / f"{stem}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]


def lay_out(
    metadata: Metadata,
    types: Sequence[tuple[ContentTensor, TensorType]],
    split_max_size: int | None,
    split_keys: Sequence[str],
    *,
    shortened: bool = False,
) -> Layout:
    """Lay the tensors out in this order; parts hold up to ``split_max_size`` bytes of tensors, or
    one tensor that is larger. Every part after the first has only the ``split_keys``.
    ``shortened``: shapes are without leading ones, as llama.cpp's quantizer writes them."""
    groups = list(_groups(types, split_max_size))
    parts, places = [], []
    for number, group in enumerate(groups):
        own = dict(metadata) if number == 0 else {}
        if len(groups) > 1:
            keys = _split_keys(number, len(groups), len(types))
            own |= {key: keys[key] for key in split_keys}
        header = _header(own, group, shortened)
        offset = len(header)
        for tensor, kind in group:
            places.append(Place(tensor, kind, number, offset))
            offset += padded(kind.stored_bytes(tensor.shape))
        parts.append(Part(header, offset))
    return Layout(tuple(parts), tuple(places))


def _groups(
    types: Sequence[tuple[ContentTensor, TensorType]], limit: int | None
) -> Iterator[list[tuple[ContentTensor, TensorType]]]:
    group: list[tuple[ContentTensor, TensorType]] = []
    size = 0
    for tensor, kind in types:
        own = padded(kind.stored_bytes(tensor.shape))
        if group and limit is not None and size + own > limit:
            yield group
            group, size = [], 0
        group.append((tensor, kind))
        size += own
    yield group


def _header(
    metadata: Metadata, tensors: Sequence[tuple[ContentTensor, TensorType]], shortened: bool
) -> bytes:
    """Everything before the data: magic, counts, keys and values, tensors, padding."""
    out = [struct.pack("<4sIQQ", b"GGUF", gguf.GGUF_VERSION, len(tensors), len(metadata))]
    out += [string(key) + value for key, value in metadata.items()]
    offset = 0
    for tensor, kind in tensors:
        axes = list(reversed(tensor.shape))
        while shortened and len(axes) > 1 and axes[-1] == 1:
            axes.pop()
        layout = f"<I{len(axes)}QIQ"
        out.append(string(tensor.name))
        out.append(struct.pack(layout, len(axes), *axes, kind.number, offset))
        offset += padded(kind.stored_bytes(tensor.shape))
    header = b"".join(out)
    return header.ljust(padded(len(header)), b"\0")


def _split_keys(number: int, count: int, tensors: int) -> dict[str, bytes]:
    return {
        "split.no": packed(number, ValueType.UINT16),
        "split.count": packed(count, ValueType.UINT16),
        "split.tensors.count": packed(tensors, ValueType.INT32),
    }
