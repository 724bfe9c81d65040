"""Energy that the machine takes, where it can be read: RAPL of the processors, NVIDIA GPUs.

A meter is of the whole machine, its other work included, and of its processor packages and GPUs
only: not of memory beside them, disks, fans or the power supply.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")
_GPU_SAMPLES = ("nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits")
_MILLISECONDS = 200


class Meter(Protocol):
    """Counts energy from some moment on."""

    def joules(self) -> float:
        """Joules counted so far."""
        ...


@contextmanager
def meter(powercap: Path = POWERCAP) -> Iterator[Meter | None]:
    """All meters of the machine together; None where there is none that may be read."""
    with ExitStack() as stack:
        found: list[Meter] = []
        packages = [Package(path) for path in sorted(powercap.glob("intel-rapl:*")) if _is(path)]
        found += packages
        gpus = stack.enter_context(_gpus())
        if gpus:
            found.append(gpus)
        yield _Sum(found) if found else None


class _Sum:
    def __init__(self, meters: list[Meter]) -> None:
        self._meters = meters

    def joules(self) -> float:
        return sum(one.joules() for one in self._meters)


class Package:
    """One processor's RAPL counter, in microjoules, which starts again at 0 when it is full.

    Must be asked more often than that: some minutes at full power.
    https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
    """

    def __init__(self, path: Path) -> None:
        self._counter = path / "energy_uj"
        self._full = int((path / "max_energy_range_uj").read_text())
        self._last = int(self._counter.read_text())
        self._total = 0

    def joules(self) -> float:
        """Joules counted since it was opened."""
        now = int(self._counter.read_text())
        self._total += (now - self._last) % (self._full + 1)
        self._last = now
        return self._total / 1e6


def _is(path: Path) -> bool:
    """Whether this is a package as a whole, and its counter may be read (often by root only)."""
    try:
        (path / "energy_uj").read_text()
        return (path / "name").read_text().startswith("package")
    except OSError:
        return False


class Gpus:
    """The power of all NVIDIA GPUs together, summed over time as ``nvidia-smi`` tells it."""

    def __init__(self, process: subprocess.Popen[str], count: int) -> None:
        self._process = process
        self._count = count
        self._joules = 0.0
        self._watts: float | None = None
        self._told = time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._read, name="gpu-power", daemon=True).start()

    def joules(self) -> float:
        """Joules since it was opened; between two samples the last power is taken to hold."""
        with self._lock:
            return self._joules + (self._watts or 0.0) * (time.monotonic() - self._told)

    def _read(self) -> None:
        assert self._process.stdout is not None
        watts: list[float] = []
        for line in self._process.stdout:
            try:
                watts.append(float(line))
            except ValueError:
                watts.append(0.0)
            if len(watts) < self._count:
                continue
            now = time.monotonic()
            with self._lock:
                self._joules += (self._watts or 0.0) * (now - self._told)
                self._told, self._watts = now, sum(watts)
            watts = []


@contextmanager
def _gpus() -> Iterator[Gpus | None]:
    try:
        once = subprocess.run(_GPU_SAMPLES, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        yield None
        return
    lines = once.stdout.split("\n") if once.returncode == 0 else []
    powers = [line for line in lines if line.strip()]
    try:
        readable = [float(power) for power in powers]
    except ValueError:  # a GPU that does not tell: [N/A]
        readable = []
    if not readable:
        yield None
        return
    argv = (*_GPU_SAMPLES, f"--loop-ms={_MILLISECONDS}")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Gpus(process, len(readable))
        finally:
            process.terminate()
