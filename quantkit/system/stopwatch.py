"""Where the time of a conversion goes: ``with stage("solve"):`` around what is to be counted.

Nothing is counted unless a ``Stopwatch`` runs. On a GPU the stages share out the time of its
stream, measured by events, so that nothing waits for the clock; on the CPU they are wall time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch

OTHER = "other"
"""Time that belongs to no stage."""


class Stopwatch:
    """Collects ``seconds`` by stage while it is entered; they add up to the whole.

    An inner stage stops the clock of the outer one. ``seconds`` is complete after the exit.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"
        self._stack = [OTHER]
        self._marks: list[tuple[str, Any]] = []

    def __enter__(self) -> Stopwatch:
        self._token = _running.set(self)
        self._mark()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        _running.reset(self._token)
        self._mark()
        if self._cuda:
            torch.cuda.synchronize()
        for (name, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            took = start.elapsed_time(stop) / 1000 if self._cuda else stop - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name``."""
        self._stack.append(name)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def _mark(self) -> None:
        """From now on the clock is that of the innermost stage."""
        if self._cuda:
            now: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self._stack[-1], now))


_running: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count what runs inside as ``name``, where a Stopwatch runs."""
    watch = _running.get()
    if watch is None:
        yield
    else:
        with watch.stage(name):
            yield
