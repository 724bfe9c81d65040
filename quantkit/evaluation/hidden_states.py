"""Hidden states on disk: every bit of them, in less than their float32, read window by window.

Of a float32 the fraction is noise, but the exponents of a model's states take few values: byte by
byte, all lowest ones first, they shrink to 84 %; states that a GPU computed in bfloat16, whose two
lower bytes are zero, to 34 %.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path


class HiddenStates(Sequence[torch.Tensor]):
    """The states of each window in an archive, ``(scored, hidden) float32``, none kept in memory.

    ``count`` windows of ``hidden`` channels, written by ``write_window``.
    """

    def __init__(self, path: Path, count: int, hidden: int) -> None:
        self._archive = ZipFile(path)
        self._count = count
        self._hidden = hidden

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return unpack(self._archive.read(_member(index % self._count)), self._hidden)


def write_window(archive: ZipFile, index: int, states: torch.Tensor) -> None:
    """Add the ``states (scored, hidden) float32`` of one window."""
    archive.writestr(_member(index), pack(states), ZIP_STORED)


def pack(states: torch.Tensor) -> bytes:
    """The bytes of ``states`` by their place in the float32, through zlib.

    Runs and single bytes only: looking for longer matches takes twice the time and finds none.
    """
    values = states.float().contiguous().numpy()
    planes = values.view(np.uint8).reshape(-1, 4).T.tobytes()
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return packer.compress(planes) + packer.flush()


def unpack(packed: bytes, hidden: int) -> torch.Tensor:
    """What was packed, ``(scored, hidden) float32``."""
    planes = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(4, -1)
    values = np.ascontiguousarray(planes.T).view(np.float32)
    return torch.from_numpy(values.reshape(-1, hidden))


def _member(window: int) -> str:
    return f"windows/{window:06}"
