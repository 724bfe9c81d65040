"""Integers with a scale per group, and the search for good scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from quantkit.formats.integer_linears import Floats, Integers


@dataclass(frozen=True)
class QuantizedBlock:
    """The linears of one block by name, and what a reader of the result should know."""

    integers: Mapping[str, Integers | Floats]
    notes: tuple[str, ...] = ()


def storable(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round scales to what survives both the file (float16) and the engine (the model's dtype).

    vLLM holds the scales of a bfloat16 model in bfloat16. Choosing among such scales, before the
    integers are chosen, costs nothing; rounding them afterwards would cost accuracy in silence.
    Zero, or what rounds to it, becomes 1: a group of zeros needs some scale.
    """
    rounded = scales.to(dtype).to(torch.float16).float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def symmetric_scales(
    weights: torch.Tensor, bits: int, importance: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The scale of each column for integers in [-2**(bits-1), 2**(bits-1)), by weighted MSE.

    ``weights``: (n, ...) float32; ``importance``: (n, ...) or broadcastable, the weight of each
    squared error; returns (...,) float32. The weight of largest magnitude may use the one integer
    more that the negative side has, so a scale can be negative.
    """
    half = 1 << (bits - 1)
    extreme = weights.gather(0, weights.abs().argmax(0, keepdim=True)).squeeze(0)
    best = torch.full_like(extreme, torch.inf)
    chosen = torch.ones_like(extreme)
    for shrink in torch.linspace(0.70, 1.20, 26).tolist():
        scale = storable(-extreme / half * shrink, dtype)
        codes = (weights / scale).round_().clamp_(-half, half - 1)
        error = codes.mul_(scale).sub_(weights).square_().mul_(importance).sum(0)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale, chosen)
    return chosen


def asymmetric_scales(
    weights: torch.Tensor, bits: int, importance: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero of each column for integers in [0, 2**bits), by weighted MSE.

    As ``symmetric_scales``; the ranges tried are a column's own, narrowed by up to 30 percent.
    Returns (...,) float32 twice, zeros as whole numbers.
    """
    top = (1 << bits) - 1
    low, high = weights.amin(0), weights.amax(0)
    best = torch.full_like(low, torch.inf)
    chosen, shift = torch.ones_like(low), torch.zeros_like(low)
    for keep in torch.linspace(1.0, 0.70, 11).tolist():
        scale, zero = asymmetric_range(low * keep, high * keep, bits, dtype)
        codes = (weights / scale).round_().add_(zero).clamp_(0, top)
        error = codes.sub_(zero).mul_(scale).sub_(weights).square_().mul_(importance).sum(0)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale, chosen)
        shift = torch.where(better, zero.float(), shift)
    return chosen, shift


def asymmetric_range(
    low: torch.Tensor, high: torch.Tensor, bits: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero that cover [low, high] and 0; any shape; float32 and int32."""
    top = (1 << bits) - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = storable((high - low) / top, dtype)
    return scales, (-low / scales).round().clamp(0, top).int()


def round_to_nearest(
    weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> Integers:
    """Each weight to the nearest integer: weights (out, in), scales and zeros (out, groups)."""
    size = weights.shape[1] // scales.shape[1]
    codes = (weights / scales.repeat_interleave(size, dim=1)).round_()
    codes = codes.add_(zeros.repeat_interleave(size, dim=1)).clamp_(0, (1 << bits) - 1)
    return Integers(codes.byte(), scales, zeros)


def plain_symmetric(
    weights: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Integers:
    """Round to nearest with scale = max|w| / (2**(bits-1) - 1): the baseline to beat.

    ``weights``: (out, in) float32; ``dtype``: the model's, in which engines hold the scales.
    """
    half = 1 << (bits - 1)
    grouped = weights.view(weights.shape[0], -1, group_size)
    scales = storable(grouped.abs().amax(-1) / (half - 1), dtype)
    codes = (grouped / scales.unsqueeze(-1)).round_().clamp_(-half, half - 1).view_as(weights)
    zeros = torch.full_like(scales, half, dtype=torch.int32)
    return Integers((codes + half).byte(), scales, zeros)


def plain_asymmetric(
    weights: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Integers:
    """Round to nearest over each group's full range; as ``plain_symmetric``."""
    grouped = weights.view(weights.shape[0], -1, group_size)
    scales, zeros = asymmetric_range(grouped.amin(-1), grouped.amax(-1), bits, dtype)
    return round_to_nearest(weights, scales, zeros, bits)


def minmax(
    weights: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype, *, symmetric: bool
) -> Integers:
    """Round to nearest as compressed-tensors does: over the full range of 2**bits - 1 steps.

    ``weights``: (out, in) float32; ``dtype``: in which the file has the scales.
    """
    top = (1 << bits) - 1
    grouped = weights.view(weights.shape[0], -1, group_size)
    if symmetric:
        scales = (grouped.abs().amax(-1) / (top / 2)).to(dtype).float()
        zeros = torch.full_like(scales, 1 << (bits - 1))
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / top).to(dtype).float()
        zeros = (-low / scales).round().clamp(0, top)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    zeros = zeros.nan_to_num_(0)
    half = 1 << (bits - 1)  # signed until the end, as there: it decides on ties
    signed = grouped / scales.unsqueeze(-1) + (zeros - half).unsqueeze(-1)
    codes = signed.round_().clamp_(-half, half - 1).add_(half)
    return Integers(codes.view_as(weights).byte(), scales, zeros.int())
