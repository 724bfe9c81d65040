"""One pass over a content that writes any number of GGUF files.

Tensors are read once, in the order of the first file, the next one while the files are made from
the current one. Every file lies at its full size from the start, and what is made is put where it
belongs; a hash follows it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.formats.gguf import ggml
from quantkit.producers.gguf.content import Content, ContentTensor
from quantkit.producers.gguf.plans import FilePlan
from quantkit.producers.gguf.quantizer import Job, Quantizer
from quantkit.system.progress import track
from quantkit.system.streaming_digest import StreamingDigest

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Output:
    """One GGUF to write: the plan and its parts' paths.

    ``error`` says why it was given up; otherwise ``sha256`` has the files' digests in the end.
    """

    plan: FilePlan
    paths: list[Path]
    error: Exception | None = None
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._descriptors: list[int] = []
        self._writing = threading.Lock()
        self._digests: list[StreamingDigest] = []
        self._places = {place.tensor.name: place for place in self.plan.layout.places}
        self._awaited = list(reversed(self.plan.layout.places))
        self._whole: set[str] = set()

    def open(self) -> None:
        """Make the files at their full size, with all but the data."""
        try:
            for path, part in zip(self.paths, self.plan.layout.parts, strict=True):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                self._descriptors.append(descriptor)
                _write(descriptor, memoryview(part.header), 0)
                os.truncate(descriptor, part.bytes)
                self._digests.append(StreamingDigest(path))
        except OSError as error:
            self.give_up(error)

    def put(self, tensor: str, data: memoryview, start: int) -> None:
        """Write bytes of a tensor's data, which begin at byte ``start`` of it."""
        if self.error is None:
            place = self._places[tensor]
            try:
                # The system lets one thread at a time write to a file, and others wait busily.
                with self._writing:
                    _write(self._descriptors[place.part], data, place.offset + start)
            except OSError as error:
                self.give_up(error)

    def finish(self, tensor: str) -> None:
        """All of the tensor's data are there."""
        self._whole.add(tensor)
        while self._awaited and self._awaited[-1].tensor.name in self._whole:
            place = self._awaited.pop()
            end = place.offset + place.type.stored_bytes(place.tensor.shape)
            if self.error is None:
                self._digests[place.part].advance(end)

    def give_up(self, error: Exception) -> None:
        """Keep the first reason, and leave nothing on the disk."""
        self.error = self.error or error
        for path in self.paths:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files and, where they are whole, note their digests."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        parts = self.plan.layout.parts
        for path, part, digest in zip(self.paths, parts, self._digests, strict=False):
            if self.error is not None:
                digest.abandon()
                continue
            try:
                self.sha256[path.name] = digest.hexdigest(part.bytes)
            except OSError as error:
                self.give_up(error)


def write(content: Content, outputs: Sequence[Output]) -> None:
    """Write all outputs; one that fails is given up, with its ``error``, and the others go on.

    Where the content cannot be read all are given up. Nothing is left of what is given up.
    """
    for output in outputs:
        for kind in {place.type.number for place in output.plan.layout.places}:
            ggml.prepare(kind)
    names = ", ".join(dict.fromkeys(output.plan.scheme for output in outputs))
    try:
        for output in outputs:
            output.open()
        with Quantizer() as quantizer:
            tensors = [place.tensor for place in outputs[0].plan.layout.places]
            for tensor, weights in _read_ahead(content, tensors, f"gguf: writing {names}"):
                jobs = [job for job in _jobs(tensor, outputs) if not _copied(content, tensor, job)]
                quantizer.quantize(tensor.name, weights, jobs)
                for output in outputs:
                    output.finish(tensor.name)
                if all(output.error for output in outputs):
                    return
    except Exception as error:
        for output in outputs:
            output.give_up(error)
    except BaseException:
        for output in outputs:
            output.give_up(InterruptedError())
        raise
    finally:
        for output in outputs:
            output.close()


def _jobs(tensor: ContentTensor, outputs: Sequence[Output]) -> list[Job]:
    """What the outputs want of a tensor; those that want the same have one job."""
    takers: dict[tuple[int, int | None], list[Output]] = {}
    for output in outputs:
        matrix = output.plan.matrix
        key = output.plan.types[tensor.name].number, None if matrix is None else id(matrix)
        takers.setdefault(key, []).append(output)
    return [
        Job(plan.types[tensor.name], plan.weights(tensor), same)
        for same in takers.values()
        for plan in [same[0].plan]
    ]


def _copied(content: Content, tensor: ContentTensor, job: Job) -> bool:
    """Whether the content has the tensor in the job's type, whose takers have got it then."""
    data = content.stored(tensor, job.type)
    if data is None:
        return False
    for taker in job.takers:
        taker.put(tensor.name, data, 0)
    return True


def _read_ahead(
    content: Content, tensors: Sequence[ContentTensor], what: str
) -> Iterator[tuple[ContentTensor, torch.Tensor]]:
    """Each tensor with its values, while the next one is being read.

    Not where both would take more memory than the largest of all does in float32.
    """
    limit = max(4 * math.prod(tensor.shape) for tensor in tensors)

    def read(tensor: ContentTensor) -> torch.Tensor:
        weights = content.read(tensor).contiguous()
        assert tuple(weights.shape) == tensor.shape, tensor.name
        _will_need(weights)
        return weights

    following = [*tensors[1:], None]
    ahead: Future[torch.Tensor] | None = None
    with ThreadPoolExecutor(1, "gguf-read") as reader:
        for tensor, after in zip(track(tensors, what), following, strict=True):
            weights = ahead.result() if ahead else read(tensor)
            ahead = None
            if after and weights.nbytes + weights.itemsize * math.prod(after.shape) <= limit:
                ahead = reader.submit(read, after)
            yield tensor, weights
            del weights  # before the next one is read


def _will_need(weights: torch.Tensor) -> None:
    """Let the system fetch what of a mapped file is not in memory yet, without waiting for it."""
    start = weights.data_ptr() & ~(mmap.PAGESIZE - 1)
    size = weights.data_ptr() + weights.nbytes - start
    _madvise(start, size, mmap.MADV_WILLNEED)


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
