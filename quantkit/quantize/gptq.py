"""GPTQ: round one column after another and let the columns still to come make up for it.

Frantar et al. 2022, arXiv 2210.17323. Columns are taken in the order of their activations, which
matters much for quality, yet without a stored permutation: whole groups are ordered, and columns
inside each group, so that every group stays contiguous in the file (desc_act false).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.blocks import DecoderBlocks
from quantkit.errors import ConversionError
from quantkit.quantize.inputs import InputStatistics
from quantkit.quantize.rounding import Integers, storable, symmetric_scales

_LAZY_COLUMNS = 128
_DAMPING_TRIES = 8


@dataclass(frozen=True)
class Solved:
    """The integers, and what solving met."""

    integers: Integers
    damp_percent: float
    """The damping that made the Hessian invertible."""
    dead_channels: int
    """Input channels that were zero on every calibration token."""


def gptq(
    weights: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    damp_percent: float = 0.01,
) -> Solved:
    """Quantize one linear, symmetric, minimizing ‖X (W - Ŵ)ᵀ‖² for hessian = XᵀX.

    ``weights``: (out, in) float32; ``hessian``: (in, in) float32; ``group_size`` divides in;
    ``dtype``: the model's, in which engines hold the scales. Several linears with the same input
    may be stacked along out. Raise ConversionError for a Hessian with non-finite entries, or one
    that no damping makes invertible.
    """
    W = weights.clone()
    H = hessian.clone()
    if not torch.isfinite(H).all():
        raise ConversionError("gptq: the calibration activations are not finite")
    importance = H.diagonal().clone()
    dead = importance == 0
    H.diagonal()[dead] = importance[~dead].mean() if (~dead).any() else 1.0

    order = group_order(importance, group_size)
    W, H, importance = W[:, order], H[order][:, order], importance[order]
    inverse, damping = _inverse_factor(H, damp_percent)

    rows, columns = W.shape
    half = 1 << (bits - 1)
    codes = torch.empty_like(W)
    scales = W.new_empty(rows, columns // group_size)
    lazy = group_size if group_size <= _LAZY_COLUMNS else _LAZY_COLUMNS
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        if start % group_size == 0:
            group = slice(start, start + group_size)
            scale = symmetric_scales(W[:, group], bits, importance[group], dtype)
            scales[:, start // group_size] = scale
        part = W[:, start:stop]
        errors = torch.empty_like(part)
        for j in range(stop - start):
            diagonal = inverse[start + j, start + j]
            column = part[:, j]
            code = (column / scale).round_().clamp_(-half, half - 1)
            codes[:, start + j] = code
            error = (column - code * scale) / diagonal
            part[:, j + 1 :].addr_(error, inverse[start + j, start + j + 1 : stop], alpha=-1)
            errors[:, j] = error
        W[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1)

    back = order.argsort()
    groups = order[::group_size] // group_size
    codes, scales = codes[:, back], scales[:, groups.argsort()]
    integers = Integers(
        codes.int() + half, scales, torch.full_like(scales, half, dtype=torch.int32)
    )
    return Solved(integers, damping, int(dead.sum()))


class BlockGPTQ:
    """Quantizes block after block; ``notes`` collects what a reader of the result should know.

    ``group_size`` -1 is one group a row; ``dtype`` as for ``gptq``.
    """

    def __init__(self, bits: int, group_size: int, dtype: torch.dtype, damp_percent: float) -> None:
        self.notes: list[str] = []
        self._bits, self._group_size = bits, group_size
        self._dtype, self._damp_percent = dtype, damp_percent

    def __call__(
        self, blocks: DecoderBlocks, index: int, block: nn.Module, hidden: list[torch.Tensor]
    ) -> dict[str, Integers]:
        """The linears of a block by name; ``hidden``: its inputs, (B, T, hidden) float32 each."""
        statistics = InputStatistics(block, blocks.linears)
        for batch in hidden:
            blocks.run(index, block, batch)
        statistics.close()
        integers: dict[str, Integers] = {}
        for leader, names in statistics.shared().items():
            # Linears with one input have one Hessian: they are solved stacked.
            linears: list[Any] = [block.get_submodule(name) for name in names]
            parts: list[torch.Tensor] = [linear.weight.data for linear in linears]
            stacked = torch.cat(parts)
            solved = gptq(
                stacked,
                statistics.hessian[leader],
                bits=self._bits,
                group_size=stacked.shape[1] if self._group_size == -1 else self._group_size,
                dtype=self._dtype,
                damp_percent=self._damp_percent,
            )
            self._note(f"{blocks.prefix(index)}{leader}", solved)
            start = 0
            for name, part in zip(names, parts, strict=True):
                integers[name] = solved.integers.rows(start, start + len(part))
                start += len(part)
        return integers

    def _note(self, where: str, solved: Solved) -> None:
        if solved.dead_channels:
            self.notes.append(f"{where}: {solved.dead_channels} dead input channels")
        if solved.damp_percent != self._damp_percent:
            self.notes.append(f"{where}: damping raised to {solved.damp_percent:.2f}")


def group_order(importance: torch.Tensor, group_size: int) -> torch.Tensor:
    """Columns by falling importance, groups by their largest and then inside each group: (in,)."""
    grouped = importance.view(-1, group_size)
    groups = grouped.amax(1).argsort(descending=True, stable=True)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    return (groups[:, None] * group_size + inside[groups]).flatten()


def _inverse_factor(hessian: torch.Tensor, damp_percent: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped Hessian, and the damping it took."""
    mean = hessian.diagonal().mean()
    for _ in range(_DAMPING_TRIES):
        damped = hessian.clone()
        damped.diagonal().add_(damp_percent * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper, damp_percent
        damp_percent *= 10
    raise ConversionError(
        f"gptq: the Hessian is singular even with damping {damp_percent:.2f}; use more or longer "
        "calibration samples"
    )


def plain_symmetric(
    weights: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> Integers:
    """Round-to-nearest with scale = max|w| / (2**(bits-1) - 1): the baseline to beat."""
    half = 1 << (bits - 1)
    grouped = weights.view(weights.shape[0], -1, group_size)
    scales = storable(grouped.abs().amax(-1) / (half - 1), dtype)
    codes = (grouped / scales.unsqueeze(-1)).round_().clamp_(-half, half - 1).view_as(weights)
    zeros = torch.full_like(scales, half, dtype=torch.int32)
    return Integers(codes.int() + half, scales, zeros)
