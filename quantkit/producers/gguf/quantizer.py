"""The rows of one tensor in ggml's types, by libggml's own functions, some rows at a time.

Threads turn rows into float32 that fits a core's cache, and quantize these for every file that is
being made. No whole tensor is ever held in another type than its own.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import ConversionError
from quantkit.formats.gguf import ggml
from quantkit.formats.gguf.ggml import TensorType

if TYPE_CHECKING:
    import torch

_VALUES = (1 << 16, 1 << 18)
"""Values that a thread works on at a time, at least and at most: up to 1 MiB as float32."""

_SLICES = 32
"""How many slices of a tensor each thread is to get, so that none waits long for the others."""

_FLOAT16_LIMIT = 65520.0
"""From this value on, float16 rounds to infinity."""


class Taker(Protocol):
    """What the bytes of a tensor go to."""

    error: Exception | None

    def put(self, tensor: str, data: memoryview, start: int) -> None:
        """Take bytes of the tensor's data, which begin at byte ``start`` of it."""
        ...

    def give_up(self, error: Exception) -> None:
        """Take no more."""
        ...


@dataclass(frozen=True)
class Job:
    """One way to quantize a tensor, and who takes the result.

    ``weights``: importance of the columns, (matrices * columns,) float32, or None.
    """

    type: TensorType
    weights: NDArray[np.float32] | None
    takers: Sequence[Taker]

    def give_up(self, error: Exception) -> None:
        """Nobody takes it any more."""
        for taker in self.takers:
            taker.give_up(error)


class Quantizer:
    """The threads, one for each core; a context that ends them."""

    def __init__(self) -> None:
        self._threads = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._threads, "gguf-quantize")
        self._stop = threading.Event()

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def quantize(self, name: str, weights: torch.Tensor, jobs: Sequence[Job]) -> None:
        """Do all jobs on a contiguous tensor, whose rows are its last axis.

        Raise ConversionError where a value is not finite: no file could hold it.
        """
        if not jobs:
            return
        rows = _Rows(name, weights, jobs)
        slices = rows.slices()
        lock = threading.Lock()

        def work() -> None:
            buffers = _Buffers(rows)
            while not self._stop.is_set():
                with lock:
                    part = next(slices, None)
                if part is None:
                    return
                rows.quantize(part, buffers)

        if weights.numel() <= _VALUES[0]:
            work()
            return
        for working in [self._pool.submit(work) for _ in range(self._threads)]:
            working.result()


@dataclass(frozen=True)
class _Slice:
    first: int
    count: int
    matrix: int
    """Which of a stack the rows belong to: each has weights of its own."""


class _Rows:
    """A tensor as rows of columns."""

    def __init__(self, name: str, weights: torch.Tensor, jobs: Sequence[Job]) -> None:
        if str(weights.dtype) not in ("torch.float32", *ggml.TO_FLOAT32):
            weights = weights.float()
        self.name = name
        self.jobs = jobs
        self.columns = weights.shape[-1]
        fair = weights.numel() // ((os.cpu_count() or 1) * _SLICES)
        self.step = max(1, min(max(fair, _VALUES[0]), _VALUES[1]) // self.columns)
        self._weights = weights
        self._to_float32 = ggml.TO_FLOAT32.get(str(weights.dtype))
        self._stacked = weights.dim() == 3 and any(job.weights is not None for job in jobs)

    def slices(self) -> Iterator[_Slice]:
        """All rows, at most ``step`` at a time and never of two matrices with weights."""
        count = self._weights.numel() // self.columns
        per_matrix = self._weights.shape[1] if self._stacked else count
        for matrix in range(count // per_matrix):
            first, end = matrix * per_matrix, (matrix + 1) * per_matrix
            for row in range(first, end, self.step):
                yield _Slice(row, min(self.step, end - row), matrix)

    def quantize(self, part: _Slice, buffers: _Buffers) -> None:
        """Do all jobs on these rows."""
        floats = self._floats(part, buffers)
        peak = max(float(floats.max()), -float(floats.min()))
        if not math.isfinite(peak):
            raise ConversionError(f"gguf: {self.name} holds NaN or infinity: the weights are bad")
        for job in self.jobs:
            if all(taker.error for taker in job.takers):
                continue
            data = self._quantized(job, part, floats, buffers)
            if not _holds(job.type, peak, data):
                job.give_up(
                    ConversionError(
                        f"gguf: {self.name} holds {peak:.3g}, more than {job.type.name} can; "
                        "use BF16 or F32"
                    )
                )
                continue
            start = part.first * job.type.row_bytes(self.columns)
            for taker in job.takers:
                taker.put(self.name, data.data, start)

    def _quantized(
        self, job: Job, part: _Slice, floats: NDArray[np.float32], buffers: _Buffers
    ) -> NDArray[np.uint8]:
        importance = None
        if job.weights is not None:
            importance = job.weights.ctypes.data + 4 * part.matrix * self.columns
        source, target = floats.ctypes.data, buffers.out.ctypes.data
        ggml.quantize(job.type, source, target, part.count, self.columns, importance)
        return buffers.out[: part.count * job.type.row_bytes(self.columns)]

    def _floats(self, part: _Slice, buffers: _Buffers) -> NDArray[np.float32]:
        start, count = part.first * self.columns, part.count * self.columns
        if self._to_float32 is None:
            floats: NDArray[np.float32] = self._weights.view(-1)[start : start + count].numpy()
            return floats
        source = self._weights.data_ptr() + start * self._weights.itemsize
        self._to_float32(source, buffers.floats.ctypes.data, count)
        return buffers.floats[:count]


def _holds(kind: TensorType, peak: float, data: NDArray[np.uint8]) -> bool:
    """Whether the type could take values up to ``peak``: float16, or blocks scaled by it."""
    if kind.name == "F16":
        return peak < _FLOAT16_LIMIT
    return kind.block == 1 or bool(ggml.is_valid(kind.number, data.ctypes.data, data.nbytes))


class _Buffers:
    """What one thread works in."""

    def __init__(self, rows: _Rows) -> None:
        largest = max(job.type.row_bytes(rows.columns) for job in rows.jobs)
        self.floats = np.empty(rows.step * rows.columns, np.float32)
        self.out = np.empty(rows.step * largest, np.uint8)
