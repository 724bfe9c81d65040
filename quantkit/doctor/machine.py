"""What this machine is: processor, memory, disk, GPUs."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from quantkit.system.home import home
from quantkit.system.machine import cores, cpu_name

_CPU = Path("/proc/cpuinfo")
_APPLE_SILICON = "asimd asimddp"
"""What every one of them has; macOS has no list of it."""
_QUERY = ("name", "memory.total", "driver_version", "compute_cap")


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, as nvidia-smi tells of it."""

    name: str
    memory_bytes: int
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """All that decides on what can run here."""

    system: str
    """``Linux``, ``Darwin``."""
    architecture: str
    """``x86_64``, ``aarch64``, ``arm64``."""
    python: str
    cpu: str
    cores: int
    cpu_flags: frozenset[str]
    """The kernel's names of CPU features: ``avx2``, ``avx512f``, ``amx_tile``, ``asimddp``."""
    memory_bytes: int
    memory_available_bytes: int
    home: str
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]
    cuda_compiler: str | None


def look() -> Machine:
    """This machine."""
    memory = psutil.virtual_memory()
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        python=platform.python_version(),
        cpu=cpu_name(),
        cores=cores(),
        cpu_flags=_cpu_flags(),
        memory_bytes=memory.total,
        memory_available_bytes=memory.available,
        home=str(home()),
        disk_free_bytes=_disk_free(home()),
        gpus=gpus(_said("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader")),
        cuda_compiler=shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"),
    )


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """The features of the first processor in /proc/cpuinfo, which x86 and Arm list under different
    keys."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def gpus(told: str) -> tuple[Gpu, ...]:
    """A line a GPU: ``NVIDIA H100, 81559 MiB, 580.65.06, 9.0``; what is no such line is no GPU."""
    found = []
    for line in told.splitlines():
        words = [word.strip() for word in line.split(",")]
        if len(words) == len(_QUERY) and (mebibytes := re.match(r"(\d+) MiB", words[1])):
            found.append(Gpu(words[0], int(mebibytes.group(1)) << 20, words[2], words[3]))
    return tuple(found)


def _cpu_flags() -> frozenset[str]:
    if _CPU.is_file():
        return cpu_flags(_CPU.read_text(encoding="utf-8"))
    if platform.machine() == "arm64":
        return frozenset(_APPLE_SILICON.split())
    names = ("machdep.cpu.features", "machdep.cpu.leaf7_features")
    return frozenset(_said("sysctl", "-n", *names).lower().split())


def _disk_free(place: Path) -> int:
    """Free bytes on the disk that holds, or will hold, this path."""
    there = next(path for path in (place, *place.parents) if path.is_dir())
    return shutil.disk_usage(there).free


def _said(*command: str) -> str:
    """What a program prints; nothing where it is not there or fails."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout if ended.returncode == 0 else ""
