"""What the load generator's processes, and the machine's meter, did while a load was on."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from quantkit.benchmark.energy import Meter

BOUND = 0.8
"""From this share on, a client's busiest process counts as the bottleneck: it is an event loop,
and one that is occupied for so much of the time sends and reads late."""
_SECONDS_BETWEEN_SAMPLES = 0.2


@dataclass(frozen=True)
class Sample:
    """Of one moment, by process: CPU seconds, and seconds ready but without a core, until then."""

    time: float
    processes: dict[int, tuple[float, float]]
    joules: float | None = None


@dataclass(frozen=True)
class Use:
    """``cpu``: cores that all its processes took together. ``busy``: share of the time that the
    busiest of them computed or waited for a core. ``joules`` of the machine, None where unknown."""

    cpu: float
    busy: float
    joules: float | None


class Watch:
    """Samples a process and its children, with its ``time.time()``, while the block runs."""

    def __init__(self, pid: int, meter: Meter | None) -> None:
        self.samples: list[Sample] = []
        self._process = psutil.Process(pid)
        self._meter = meter
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def use(self, start: float, end: float) -> Use | None:
        """See ``use``, of what was sampled until now."""
        return use(list(self.samples), start, end)

    def _run(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_SAMPLES):
            try:
                found = [self._process, *self._process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            processes = {}
            for process in found:
                try:
                    cpu = process.cpu_times()
                except psutil.NoSuchProcess:
                    continue
                processes[process.pid] = (cpu.user + cpu.system, _waited(process.pid))
            joules = self._meter.joules() if self._meter else None
            self.samples.append(Sample(time.time(), processes, joules))


def use(samples: Sequence[Sample], start: float, end: float) -> Use | None:
    """Between two moments, or rather the samples next to them; None where there are none."""
    before = [sample for sample in samples if sample.time <= start]
    until = [sample for sample in samples if start < sample.time <= end]
    if not until:
        return None
    first, last = (before or until)[-1 if before else 0], until[-1]
    seconds = last.time - first.time
    if seconds <= 0:
        return None
    deltas = []
    for pid, (cpu, waited) in last.processes.items():
        cpu_before, waited_before = first.processes.get(pid, (0.0, 0.0))
        deltas.append((cpu - cpu_before, waited - waited_before))
    joules = None
    if first.joules is not None and last.joules is not None:
        # The window is not quite what was sampled: the same power over all of it.
        joules = (last.joules - first.joules) * (end - start) / seconds
    return Use(
        sum(cpu for cpu, _ in deltas) / seconds,
        min(1.0, max((cpu + waited for cpu, waited in deltas), default=0.0) / seconds),
        joules,
    )


def _waited(pid: int) -> float:
    """Seconds that the process's first thread, its event loop, was ready and had no core; Linux."""
    try:
        _, waited_ns, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0.0
    return int(waited_ns) / 1e9
