"""How fast this machine moves memory, with all its cores: the limit that decoding runs into.

Counted as STREAM does (McCalpin 1995): the best of several passes over arrays that no cache holds,
a copy as two bytes moved for each, ``a = b + s * c`` as three. Decoding reads and hardly writes, so
that the figure to compare with is ``read``: the sum of an array.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from quantkit.ledger.load import MemoryBandwidth

_ARRAY_BYTES = 256 << 20
_TIMES_THE_CACHE = 8
_SHARE_OF_MEMORY = 16
_PASSES = 8


def memory_bandwidth(array_bytes: int | None = None, passes: int = _PASSES) -> MemoryBandwidth:
    """Measure it now, in a second or two; nothing else should compute meanwhile."""
    import torch

    size = array_bytes or _size()
    count = size // 4
    one, two, three = (torch.full((count,), value) for value in (1.0, 2.0, 3.0))

    def best(work: Callable[[], object], arrays: int) -> float:
        seconds = []
        for _ in range(passes + 1):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        # The first touches memory and starts threads.
        return arrays * 4 * count / min(seconds[1:])

    return MemoryBandwidth(
        read_bytes_per_s=best(one.sum, 1),
        copy_bytes_per_s=best(lambda: two.copy_(one), 2),
        triad_bytes_per_s=best(lambda: torch.add(one, two, alpha=3.0, out=three), 3),
        threads=torch.get_num_threads(),
        array_bytes=4 * count,
    )


def _size() -> int:
    """Several times what the caches hold, and a small part of the memory."""
    wanted = max(_ARRAY_BYTES, _TIMES_THE_CACHE * _cache_bytes())
    return min(wanted, psutil.virtual_memory().available // _SHARE_OF_MEMORY)


def _cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of all last-level caches; 0 where Linux does not say."""
    found: dict[str, int] = {}
    for cache in cpus.glob("cpu[0-9]*/cache/index3"):
        try:
            size = (cache / "size").read_text().strip()
            shared = (cache / "shared_cpu_list").read_text().strip()
            found[shared] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return sum(found.values())
