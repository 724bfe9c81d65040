"""AWQ: scale the channels that matter up before rounding, and back down in what precedes them.

Lin et al. 2023, arXiv 2306.00978. Linears that share an input take the channel scales
s = a**α / b**γ, with a the mean activation of a channel and b its mean relative weight; the authors
have γ = 1 - α. They search α by what rounding to nearest loses, then clip each group's range and
round to nearest.

Here GPTQ rounds instead: a clipped block gives less than it should, every block a little less, and
the losses add up along the stream. So α and γ are searched by what is expected to be left after
GPTQ. What helps rounding to nearest often does not help it (tests/benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.decoder.structure import Fold, fold_scales
from quantkit.formats.integer_linears import Integers
from quantkit.quantize.block_gptq import BlockGPTQ
from quantkit.quantize.gptq import remaining_variances
from quantkit.quantize.inputs import InputStatistics, dead_channels
from quantkit.quantize.rounding import QuantizedBlock, asymmetric_range
from quantkit.quantize.streamed import StreamedBlock, linear_weight

_ALPHAS = 10
_GAMMAS = 5
_WEIGHED_TOKENS = 8192
"""Tokens, taken evenly from all windows, of the Hessians with which scales are searched; all tokens
would take most of the time."""


@dataclass(frozen=True)
class Grid:
    """The integers to round to: bits, group size, and the dtype in which engines hold scales."""

    bits: int
    group_size: int
    dtype: torch.dtype

    def steps(self, weights: torch.Tensor) -> torch.Tensor:
        """The distance between two neighbours of the grid, by output and group, for weights
        (out, in) whose groups are rounded over their full range; (out, groups) float32."""
        grouped = weights.view(len(weights), -1, self.group_size)
        steps, _ = asymmetric_range(grouped.amin(-1), grouped.amax(-1), self.bits, self.dtype)
        return steps.float()


class BlockAWQ:
    """Quantizes block after block: scales channels, then rounds as GPTQ does, each linear for what
    those before it give now. ``dtype``: the model's, in which engines hold the scales. With
    ``iters``, that many steps of learning follow (``quantize/learned.py``)."""

    def __init__(self, dtype: torch.dtype, iters: int = 0) -> None:
        self._dtype = dtype
        self._round = BlockGPTQ(dtype, iters, symmetric=False)

    def __call__(self, block: StreamedBlock) -> QuantizedBlock:
        """The integers of a block's linears. Its norms, and its linears where they feed others,
        take the scales."""
        scheme = next(iter(block.linears.values()))
        self._scale(block, Grid(scheme.bits, scheme.group_size, self._dtype))
        return self._round(block, is_source=False)

    def rounded(self, block: StreamedBlock, module: nn.Module) -> dict[str, Integers]:
        """As ``BlockGPTQ.rounded``."""
        return self._round.rounded(block, module)

    def _scale(self, block: StreamedBlock, grid: Grid) -> None:
        module = block.module
        scaled = block.folds
        every = -(-block.inputs.tokens // _WEIGHED_TOKENS)
        statistics = InputStatistics(module, [fold.given for fold in scaled], every)
        block.run()
        statistics.close()
        dtype = next(module.parameters()).dtype
        for fold in scaled:
            if fold.given not in statistics.leader:
                continue  # of an expert that saw no token
            given = statistics.leader[fold.given]
            dead_channels(statistics.mean_abs[given], f"{block.name}.{given}")
            hessian = statistics.hessian[given].to(dtype)
            scale = search_scales(module, fold, statistics.mean_abs[given], hessian, grid)
            fold_scales(module, fold, storable_scales(module, fold, scale, self._dtype))


def search_scales(
    block: nn.Module,
    fold: Fold,
    mean_abs: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Scales of the balance layers' input channels with the least loss expected after GPTQ, (in,).

    ``mean_abs``: (in,) and ``hessian``: (in, in) of that input. An error of rounding is spread
    evenly over a step of the grid, so that a step h of a channel with the remaining variance v
    loses h² v / 12.
    """
    floats = [linear_weight(block, name) for name in fold.balance_layers]
    channels = fold.channels
    strength = channels.reduce(mean_abs)
    relative = channels.reduce(_relative_weight(floats, grid.group_size))
    remaining = remaining_variances(hessian).to(mean_abs.dtype)

    def expected_loss(scale: torch.Tensor) -> float:
        squares = sum(grid.steps(weight * scale).square().sum(0) for weight in floats)
        assert isinstance(squares, torch.Tensor)
        return float((squares.repeat_interleave(grid.group_size) * remaining / scale**2).sum())

    best = torch.ones_like(mean_abs)
    least = expected_loss(best)
    for alpha in range(_ALPHAS):
        for gamma in range(_GAMMAS):
            scale = strength ** (alpha / _ALPHAS) / (relative ** (gamma / (_GAMMAS - 1)) + 1e-4)
            scale = scale.clamp(min=1e-4)
            scale = channels.expand(scale / (scale.max() * scale.min()).sqrt())
            if (loss := expected_loss(scale)) < least:
                least, best = loss, scale
    return best


def storable_scales(
    block: nn.Module, fold: Fold, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The scales near ``scale`` (in,) for which the divided norm is exact in the model's ``dtype``.

    The file holds the norm's weight, less its offset, rounded to eight bits; where 1 + weight is
    small, that would lose most of it. The balance layers take the scales that the rounded norm
    really has, so nothing is lost. A linear as the smooth layer keeps the scales as they are.
    """
    weight = block.get_parameter(f"{fold.smooth_layer}.weight").data.double()
    if weight.dim() != 1:
        return scale
    weight = weight + fold.offset
    scale = fold.channels.pick(scale)
    divided = (weight / scale - fold.offset).to(dtype).double() + fold.offset
    found = torch.where(weight == 0, scale, weight / divided)
    # A norm that would vanish keeps its scale.
    found = torch.where(found.isfinite() & (found > 0), found, 1.0).to(scale.dtype)
    return fold.channels.expand(found)


def _relative_weight(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """Mean of |w| relative to its group's largest, per input channel of all of them: (in,)."""
    total = torch.zeros_like(weights[0][0])
    for weight in weights:
        grouped = weight.abs().view(len(weight), -1, group_size)
        relative = grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-12)
        total += relative.view_as(weight).sum(0)
    return total / sum(map(len, weights))
