"""The memory of this machine's NVIDIA GPUs, as it is now."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

_COMMAND = ("nvidia-smi", "--query-gpu=uuid,memory.total,memory.free", "--format=csv,noheader")


@dataclass(frozen=True)
class Card:
    """A GPU's memory, in bytes."""

    total: int
    free: int


def cards() -> list[Card]:
    """Those that this process may use, in its order; none where there is none that tells, such as a
    part of a GPU (MIG)."""
    try:
        ended = subprocess.run(_COMMAND, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    told = ended.stdout if ended.returncode == 0 else ""
    return read(told, os.environ.get("CUDA_VISIBLE_DEVICES"))


def read(told: str, visible: str | None) -> list[Card]:
    """Lines ``GPU-1b2c…, 81559 MiB, 80000 MiB``; ``visible``: CUDA_VISIBLE_DEVICES, numbers or
    (beginnings of) UUIDs, of which CUDA ignores all from the first unknown one on."""
    found: list[tuple[str, Card | None]] = []
    for line in told.splitlines():
        uuid, *sizes = (word.strip() for word in line.split(","))
        numbers = [int(size.group(1)) << 20 for s in sizes if (size := re.match(r"(\d+) MiB$", s))]
        found.append((uuid, Card(*numbers) if len(numbers) == 2 else None))
    if visible is not None:
        chosen = []
        for word in visible.split(","):
            one = next((f for i, f in enumerate(found) if _is(word.strip(), i, f[0])), None)
            if one is None:
                break
            chosen.append(one)
        found = chosen
    known = [card for _, card in found if card]
    return known if len(known) == len(found) else []


def _is(word: str, index: int, uuid: str) -> bool:
    return word == str(index) if word.isdigit() else bool(word) and uuid.startswith(word)
