"""AWQ: scale the channels that matter up before rounding, and back down in what precedes them.

Lin et al. 2023, arXiv 2306.00978. For each family of linears that share an input, the strength α
of the scaling s = a**α / b**(1-α), with a the mean activation and b the mean relative weight of a
channel, is searched against the output error of the module they belong to; then each group's
range is clipped where that lowers its output error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.decoder.expert_names import expert_of
from quantkit.quantize.families import Family, families, fold_channels, fold_scales
from quantkit.quantize.inputs import InputStatistics, RecordedCalls, dead_channels
from quantkit.quantize.learned import Start, learn
from quantkit.quantize.rounding import Integers, QuantizedBlock, asymmetric_range, round_to_nearest
from quantkit.quantize.streamed import StreamedBlock, linear_weight, unseen_note

_ALPHAS = 20
_CLIP_STEPS = 10
_LOWEST_CLIP = 0.5
_ROWS_AT_ONCE = 512
_JUDGED_TOKENS = 1024
"""How many tokens the output of attention and of the MLP is compared on, for each α."""
_WEIGHED_TOKENS = 8192
"""How many, of all windows, errors of single linears are summed over; the Hessians of all tokens
would take most of the time."""

UNCLIPPED = ("q_proj", "k_proj")
"""Their product is what attention softens: clipping them for their own output error hurts it."""


@dataclass(frozen=True)
class Grid:
    """The integers to round to: bits, group size, and the dtype in which engines hold scales."""

    bits: int
    group_size: int
    dtype: torch.dtype

    def fake(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights after rounding to nearest over each group's full range; (out, in) float32."""
        return self.round(weights, *self.extent(weights)).dequantize()

    def extent(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest weight of each group, (out, groups)."""
        grouped = weights.view(weights.shape[0], -1, self.group_size)
        return grouped.amin(-1), grouped.amax(-1)

    def round(self, weights: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Integers:
        """Round to nearest over the given range of each group."""
        scales, zeros = asymmetric_range(low, high, self.bits, self.dtype)
        return round_to_nearest(weights, scales, zeros, self.bits)


class BlockAWQ:
    """Quantizes block after block; ``dtype``: the model's, in which engines hold the scales. With
    ``iters``, that many steps of learning follow (``quantize/learned.py``)."""

    def __init__(self, dtype: torch.dtype, iters: int = 0) -> None:
        self._dtype, self._iters = dtype, iters
        self.follows_source = iters > 0

    def __call__(self, block: StreamedBlock) -> QuantizedBlock:
        """Scale, clip and round the linears of a block.

        The block's float weights and norms take the scales, so that rounding them again gives
        what is returned.
        """
        scheme = next(iter(block.linears.values()))
        grid = Grid(scheme.bits, scheme.group_size, self._dtype)
        module = block.module
        target = block.advance_source(module) if self._iters else None
        scaled = families(block.linears)
        every = -(-block.inputs.tokens // _WEIGHED_TOKENS)
        watched = dict.fromkeys([*block.linears, *(family.given for family in scaled)])
        statistics = InputStatistics(module, watched, every)
        judged = {
            family.judge: RecordedCalls(module, family.judge, _JUDGED_TOKENS)
            for family in scaled
            if family.judge
        }
        block.run()
        statistics.close()
        dtype = next(module.parameters()).dtype
        hessians = {leader: hessian.to(dtype) for leader, hessian in statistics.hessian.items()}
        for calls in judged.values():
            calls.close()
        notes = [
            f"{block.name}.{leader}: {dead} dead input channels"
            for leader, size in statistics.mean_abs.items()
            if (dead := dead_channels(size, f"{block.name}.{leader}"))
        ]
        leaders = statistics.leader
        unseen = {expert_of(name) for name in block.linears if name not in leaders}
        notes += unseen_note(block, unseen)
        for family in scaled:
            if family.given not in leaders:
                continue  # of an expert that saw no token
            given = leaders[family.given]
            run = judged[family.judge].replay(block.blocks.autocast) if family.judge else None
            scale = search_scales(
                module, family, statistics.mean_abs[given], hessians[given], run, grid
            )
            fold_scales(module, family, scale)
            # What they are given is now smaller by that.
            for leader in {leaders[name] for name in family.readers if name in leaders}:
                hessians[leader] /= scale[:, None] * scale
        starts = {}
        for name in block.linears:
            weights = linear_weight(module, name)
            if name.endswith(UNCLIPPED) or name not in leaders:
                low, high = grid.extent(weights)
            else:
                low, high = clip(weights, hessians[leaders[name]], grid)
            starts[name] = Start(weights, grid.round(weights, low, high))
        if target:
            learned = learn(block, target, starts, self._iters)
            return QuantizedBlock(learned.integers, tuple(notes))
        integers = {name: start.integers for name, start in starts.items()}
        return QuantizedBlock(integers, tuple(notes))


def search_scales(
    block: nn.Module,
    family: Family,
    mean_abs: torch.Tensor,
    hessian: torch.Tensor,
    run: Callable[[nn.Module], torch.Tensor] | None,
    grid: Grid,
) -> torch.Tensor:
    """The channel scales of the family's input that lose least, (in,) float32.

    ``mean_abs``: (in,) and ``hessian``: (in, in) of the family's input. ``run`` gives the judge's
    output on sample inputs; without a judge the error is tr(ΔW H ΔWᵀ).
    """
    readers = [block.get_submodule(name) for name in family.readers]
    originals = [linear_weight(block, name) for name in family.readers]
    fold = fold_channels(block, family)
    strength = fold.reduce(mean_abs)
    relative = fold.reduce(_relative_weight(originals, grid.group_size))
    judge = block.get_submodule(family.judge) if family.judge else None
    wanted = run(judge) if run and judge is not None else None

    def rounded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (grid.fake(weight * scale) / scale).to(weight.dtype)

    best, chosen = torch.inf, torch.ones_like(mean_abs)
    for step in range(_ALPHAS):
        alpha = step / _ALPHAS
        scale = strength.pow(alpha) / (relative.pow(1 - alpha) + 1e-4) if step else strength * 0 + 1
        scale = scale.clamp(min=1e-4)
        scale = fold.expand(scale / (scale.max() * scale.min()).sqrt())
        if wanted is None or run is None or judge is None:
            error = 0.0
            for weight in originals:
                lost = weight - rounded(weight, scale)
                error += float((lost @ hessian).mul_(lost).sum())
        else:
            for reader, weight in zip(readers, originals, strict=True):
                reader.weight.data = rounded(weight, scale)
            error = float((run(judge) - wanted).square_().mean())
        if error < best:
            best, chosen = error, scale
    for reader, weight in zip(readers, originals, strict=True):
        reader.weight.data = weight
    return chosen


def clip(
    weights: torch.Tensor, hessian: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each group that loses least of the output: low and high, (out, groups).

    ``weights``: (out, in); ``hessian``: (in, in). A group's error is Δ H_gg Δᵀ, with H_gg the
    block of the Hessian of its channels.
    """
    size = grid.group_size
    low, high = grid.extent(weights)
    groups = low.shape[1]
    blocks = torch.stack(
        [hessian[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)]
    )
    best_low, best_high = low.clone(), high.clone()
    for start in range(0, len(weights), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        best = torch.full_like(low[rows], torch.inf)
        for step in range(_CLIP_STEPS + 1):
            keep = 1 - (1 - _LOWEST_CLIP) * step / _CLIP_STEPS
            rounded = grid.round(weights[rows], low[rows] * keep, high[rows] * keep).dequantize()
            delta = (weights[rows] - rounded).view(-1, groups, size).transpose(0, 1)
            error = torch.bmm(delta, blocks).mul_(delta).sum(-1).T
            better = error < best
            best = torch.where(better, error, best)
            best_low[rows] = torch.where(better, low[rows] * keep, best_low[rows])
            best_high[rows] = torch.where(better, high[rows] * keep, best_high[rows])
    return best_low, best_high


def _relative_weight(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """Mean of |w| relative to its group's largest, per input channel of all of them: (in,)."""
    total = torch.zeros_like(weights[0][0])
    for weight in weights:
        grouped = weight.abs().view(len(weight), -1, group_size)
        relative = grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-12)
        total += relative.view_as(weight).sum(0)
    return total / sum(map(len, weights))
