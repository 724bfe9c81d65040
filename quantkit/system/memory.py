"""Peak resident memory of a process tree, by sampling."""

from __future__ import annotations

import os
import threading
from types import TracebackType

import psutil

_SECONDS_BETWEEN_SAMPLES = 0.05


class PeakMemory:
    """Watch a process, with or without its children, while the ``with`` block runs.

    ``peak_bytes`` is the largest sum of resident sets seen; pages that processes share count in
    each of them.
    """

    def __init__(self, pid: int | None = None, *, children: bool = False) -> None:
        self.peak_bytes = 0
        self._process = psutil.Process(pid or os.getpid())
        self._children = children
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sample()
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_SAMPLES):
            self._sample()

    def _sample(self) -> None:
        total = 0
        try:
            processes = [self._process]
            if self._children:
                processes += self._process.children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        self.peak_bytes = max(self.peak_bytes, total)
