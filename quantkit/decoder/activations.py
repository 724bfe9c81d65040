"""The activations between two blocks: kept outside the device, and bounded in memory."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, MutableMapping

import torch
from torch.utils.weak import WeakTensorKeyDictionary

MEMORY_LIMIT = 16 << 30
"""Bytes of activations held in memory; more of them lie in a file. 128 x 2048 tokens of an 8 B
model take 4 GiB."""


class Activations:
    """The residual stream of all calibration windows: ``shape`` (samples, T, hidden) float32.

    Read and replaced batch by batch. Pinned where the device is a GPU, so that copies to and fro
    do not wait for each other. Above ``limit`` bytes a temporary file holds them, which the system
    drops with the process.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        batch: int,
        device: torch.device,
        limit: int | None = None,
    ) -> None:
        count = math.prod(shape)
        if count * 4 <= (MEMORY_LIMIT if limit is None else limit):
            self._all = torch.empty(shape, pin_memory=device.type == "cuda")
        else:
            with tempfile.NamedTemporaryFile(prefix="quantkit-activations-") as file:
                os.truncate(file.name, count * 4)
                # Mapped, the file lives on after its name is gone.
                mapped = torch.from_file(file.name, shared=True, size=count)
            self._all = mapped.view(shape)
        self._batches = torch.split(self._all, batch)
        self._device = device
        self.varying: list[dict[str, torch.Tensor]] = []
        """By block, what the model passes to it that is another for each window: (samples, n, …),
        ``n`` rows of a batch for each."""

    @property
    def shape(self) -> torch.Size:
        """(samples, T, hidden)."""
        return self._all.shape

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.shape[:2].numel()

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Each batch, (B, T, hidden), on the device."""
        for index in range(len(self)):
            yield self.batch(index)

    def batch(self, index: int) -> torch.Tensor:
        """One batch on the device."""
        first = self.windows(index)
        numbers = torch.arange(first, first + len(self._batches[index]))
        return self._known(self._batches[index], numbers)

    def windows(self, batches: int) -> int:
        """How many windows the first ``batches`` batches hold."""
        return sum(len(batch) for batch in self._batches[:batches])

    def pick(self, windows: torch.Tensor) -> torch.Tensor:
        """Single windows, (n, T, hidden), on the device; ``windows``: (n,) their numbers."""
        return self._known(self._all[windows], windows)

    def copy(self) -> Activations:
        """The same windows in memory, or a file, of their own."""
        other = Activations(self.shape, batch=len(self._batches[0]), device=self._device)
        other._all.copy_(self._all)
        other.varying = self.varying
        return other

    def replace(self, index: int, values: torch.Tensor) -> None:
        """Put the next block's inputs in the place of this one's."""
        self._batches[index].copy_(values, non_blocking=True)

    def _known(self, values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """On the device, and known to ``varying_of``."""
        moved = values.to(self._device, non_blocking=True)
        moved = moved.view_as(moved)  # of its own: on the CPU this was the same tensor
        _OF[moved] = self, numbers
        return moved


_OF: MutableMapping[torch.Tensor, tuple[Activations, torch.Tensor]] = WeakTensorKeyDictionary()
"""Of which windows a batch is."""


def varying_of(batch: torch.Tensor, index: int) -> dict[str, torch.Tensor] | None:
    """What the model passes to block ``index`` besides this batch that is another for each window;
    None of a tensor that ``Activations`` did not give."""
    if batch not in _OF:
        return None
    activations, numbers = _OF[batch]
    if not activations.varying:
        return {}
    given = activations.varying[index]
    return {name: value[numbers].flatten(0, 1).to(batch.device) for name, value in given.items()}
