"""The device that calibration and the native quantizers compute on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import RecipeError

if TYPE_CHECKING:
    import torch

AUTO = "auto"


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


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that torch held on the GPU since its statistics were last reset; None on
    the CPU, whose peak is that of the process."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def describe(device: torch.device) -> str:
    """``cpu``, or the GPU's name: ``NVIDIA H100 80GB HBM3``."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
