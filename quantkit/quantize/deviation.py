"""How far the output of a quantized block is from the float block's, and in which way."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Deviation:
    """How far a block's output is from what it should be; Δ is the difference, A what the block
    adds to its input stream."""

    error: float
    """‖Δ‖ / ‖A‖."""
    gain: float
    """⟨Δ, A⟩ / ⟨A, A⟩: by how much too loud the block is. Single blocks hardly mind, but the gains
    of all blocks multiply along the stream."""
    mean_error: float
    """‖mean of Δ over tokens‖² / mean of ‖Δ‖²: how much of the error every token has alike."""


def deviation(found: torch.Tensor, exact: torch.Tensor, given: torch.Tensor) -> Deviation:
    """The deviation of ``found`` from ``exact``, both outputs for ``given``: all (..., hidden)
    float32. NaN where any of them is not finite."""
    delta = (found - exact).flatten(0, -2)
    added = (exact - given).flatten(0, -2)
    square = delta.square().sum(dtype=torch.float64)
    size = added.square().sum(dtype=torch.float64)
    along = (delta * added).sum(dtype=torch.float64)
    common = delta.mean(0, dtype=torch.float64).square().sum() * len(delta)
    return Deviation(
        float((square / size).sqrt()),
        float(along / size),
        float(common / square) if square > 0 else 0.0,
    )
