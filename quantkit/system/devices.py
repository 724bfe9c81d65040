"""The device that calibration and the native quantizers compute on, and in which precision."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Literal

from quantkit.errors import RecipeError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
Precision = Literal["auto", "bfloat16", "float32", "float64"]

_ROWS, _COLUMNS = 128, 512
"""Rows and columns of the matrices whose product is timed: a hundredth of a second where it is
slow."""
_WORTH = 0.8
"""bfloat16 loses digits: it is used only if it saves a fifth of the time."""


def choose(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto``: the GPU where torch finds one, else the CPU.

    Raise RecipeError for a device that torch does not know or this machine does not have.
    """
    import torch

    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"device {name!r}: the quantizers run on cpu and cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RecipeError(
            f"device {name!r}: torch {torch.__version__} finds "
            f"{count or 'no'} CUDA device{'s' * (count != 1)} here; use --device cpu"
        )
    return device


def precision(name: Precision, device: torch.device) -> torch.dtype:
    """What matrix products are computed in; for ``auto`` bfloat16 on a GPU and on a CPU that is
    faster with it, float32 on others: those without instructions for it take up to 70 times as
    long."""
    import torch

    if name != AUTO:
        found: torch.dtype = getattr(torch, name)
        return found
    if device.type == "cuda":
        return torch.bfloat16
    return _fastest_on_cpu()


@cache
def _fastest_on_cpu() -> torch.dtype:
    import torch

    narrow, wide = _seconds(torch.bfloat16), _seconds(torch.float32)
    return torch.bfloat16 if narrow < _WORTH * wide else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    """Seconds of the fastest of three matrix products, after a warm-up."""
    import torch

    left, right = torch.ones(_ROWS, _COLUMNS), torch.ones(_COLUMNS, _COLUMNS)
    left, right = left.to(dtype), right.to(dtype)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that torch held on the GPU since its statistics were last reset; None on
    the CPU, whose peak is that of the process."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def describe(device: torch.device) -> str:
    """``cpu``, or the GPU's name: ``NVIDIA H100 80GB HBM3``."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
