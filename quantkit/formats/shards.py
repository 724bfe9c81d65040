"""Safetensors files whose tensors are written one at a time, and can be read back meanwhile.

Which tensors there will be is known before: the headers are written first, with room for all
data. The bytes are those that ``safetensors.torch.save_file`` would write.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from quantkit.models import dtypes

_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Entry:
    """One tensor to come; ``dtype`` in safetensors' words (``BF16``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return dtypes.stored_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are: in which open file, from which byte on."""

    descriptor: int
    offset: int
    entry: Entry


class Shards:
    """The safetensors files of a checkpoint in ``directory``, open for writing.

    One shard is ``model.safetensors``; several have the usual names and an index. Files that an
    interrupted attempt left, with the same headers, are gone on with. OSError where the disk is
    full: the room is taken when a file is made.
    """

    def __init__(
        self, directory: Path, entries: Sequence[Entry], shard_bytes: int = _SHARD_BYTES
    ) -> None:
        groups: list[list[Entry]] = [[]]
        for entry in entries:
            if groups[-1] and sum(e.bytes for e in groups[-1]) + entry.bytes > shard_bytes:
                groups.append([])
            groups[-1].append(entry)
        count = len(groups)
        self._places: dict[str, _Place] = {}
        self._descriptors: list[int] = []
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, 1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            file = "model.safetensors" if count == 1 else file
            self._open(directory / file, group)
            weight_map |= {entry.name: file for entry in group}
        if count > 1:
            total = sum(entry.bytes for entry in entries)
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / "model.safetensors.index.json").write_text(
                json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor into its place; it has the dtype and the shape that were announced."""
        place = self._places[name]
        expected = (dtypes.torch_dtype(place.entry.dtype), place.entry.shape)
        assert (tensor.dtype, tuple(tensor.shape)) == expected, name
        raw = tensor.detach().cpu().flatten().view(torch.uint8).numpy()
        data, offset = raw.data, place.offset
        while len(data):
            written = os.pwrite(place.descriptor, data, offset)
            data, offset = data[written:], offset + written

    def read(self, name: str) -> torch.Tensor:
        """One tensor as it was written, on the CPU."""
        place = self._places[name]
        data = bytearray(place.entry.bytes)
        view, at = memoryview(data), 0
        while at < len(data):
            got = os.preadv(place.descriptor, [view[at:]], place.offset + at)
            assert got, name
            at += got
        dtype = dtypes.torch_dtype(place.entry.dtype)
        return torch.frombuffer(data, dtype=dtype).view(place.entry.shape)

    def _open(self, path: Path, entries: Sequence[Entry]) -> None:
        order = dtypes.FILE_ORDER.index
        entries = sorted(entries, key=lambda entry: (order(entry.dtype), entry.name))
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in entries:
            end = offset + entry.bytes
            described[entry.name] = {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._descriptors.append(descriptor)
        if os.pread(descriptor, len(header), 0) != header:
            os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, len(header) + offset)
            os.pwrite(descriptor, header, 0)
        start = len(header)
        for entry in entries:
            self._places[entry.name] = _Place(descriptor, start, entry)
            start += entry.bytes
