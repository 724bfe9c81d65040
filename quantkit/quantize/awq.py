"""AWQ: scale the channels that matter up before rounding, and back down in what precedes them.

Lin et al. 2023, arXiv 2306.00978. For linears that share an input, the strength α
of the scaling s = a**α / b**(1-α), with a the mean activation and b the mean relative weight of a
channel, is searched against the output error of the module they belong to.

The authors then clip each group's range and round to nearest. Here GPTQ rounds instead: a clipped
block gives less than it should, every block a little less, and the losses add up along the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.decoder.structure import Fold, fold_scales
from quantkit.formats.integer_linears import Integers
from quantkit.quantize.block_gptq import BlockGPTQ
from quantkit.quantize.inputs import InputStatistics, RecordedCalls, dead_channels
from quantkit.quantize.rounding import QuantizedBlock, plain_asymmetric
from quantkit.quantize.streamed import StreamedBlock, linear_weight

_ALPHAS = 20
_JUDGED_TOKENS = 1024
"""How many tokens the output of attention and of the MLP is compared on, for each α."""
_WEIGHED_TOKENS = 8192
"""How many, of all windows, errors of single linears are summed over; the Hessians of all tokens
would take most of the time."""


@dataclass(frozen=True)
class Grid:
    """The integers to round to: bits, group size, and the dtype in which engines hold scales."""

    bits: int
    group_size: int
    dtype: torch.dtype

    def fake(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights after rounding to nearest over each group's full range; (out, in) float32."""
        return plain_asymmetric(weights, self.bits, self.group_size, self.dtype).dequantize()


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
        scaled = [
            fold for fold in block.structure.folds if block.linears.keys() >= set(fold.readers)
        ]
        every = -(-block.inputs.tokens // _WEIGHED_TOKENS)
        statistics = InputStatistics(module, [fold.given for fold in scaled], every)
        judged = {
            fold.judge: RecordedCalls(module, fold.judge, _JUDGED_TOKENS)
            for fold in scaled
            if fold.judge is not None
        }
        block.run()
        statistics.close()
        for calls in judged.values():
            calls.close()
        dtype = next(module.parameters()).dtype
        for fold in scaled:
            if fold.given not in statistics.leader:
                continue  # of an expert that saw no token
            given = statistics.leader[fold.given]
            dead_channels(statistics.mean_abs[given], f"{block.name}.{given}")
            judge = judged[fold.judge] if fold.judge is not None else None
            run = judge.replay(block.blocks.autocast) if judge else None
            hessian = statistics.hessian[given].to(dtype)
            scale = search_scales(module, fold, statistics.mean_abs[given], hessian, run, grid)
            fold_scales(module, fold, storable_scales(module, fold, scale, self._dtype))


def search_scales(
    block: nn.Module,
    fold: Fold,
    mean_abs: torch.Tensor,
    hessian: torch.Tensor,
    run: Callable[[nn.Module], torch.Tensor] | None,
    grid: Grid,
) -> torch.Tensor:
    """The channel scales of the readers' input that lose least, (in,) float32.

    ``mean_abs``: (in,) and ``hessian``: (in, in) of that input. ``run`` gives the judge's
    output on sample inputs; without a judge the error is tr(ΔW H ΔWᵀ).
    """
    readers = [block.get_submodule(name) for name in fold.readers]
    floats = [linear_weight(block, name) for name in fold.readers]
    channels = fold.channels
    strength = channels.reduce(mean_abs)
    relative = channels.reduce(_relative_weight(floats, grid.group_size))
    judge = block.get_submodule(fold.judge) if fold.judge is not None else None
    wanted = run(judge) if run and judge is not None else None

    def rounded(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (grid.fake(weight * scale) / scale).to(weight.dtype)

    best, chosen = torch.inf, torch.ones_like(mean_abs)
    for step in range(_ALPHAS):
        alpha = step / _ALPHAS
        scale = strength.pow(alpha) / (relative.pow(1 - alpha) + 1e-4) if step else strength * 0 + 1
        scale = scale.clamp(min=1e-4)
        scale = channels.expand(scale / (scale.max() * scale.min()).sqrt())
        if wanted is None or run is None or judge is None:
            error = 0.0
            for weight in floats:
                lost = weight - rounded(weight, scale)
                error += float((lost @ hessian).mul_(lost).sum())
        else:
            for reader, weight in zip(readers, floats, strict=True):
                reader.weight.data = rounded(weight, scale)
            error = float((run(judge) - wanted).square_().mean())
        if error < best:
            best, chosen = error, scale
    for reader, weight in zip(readers, floats, strict=True):
        reader.weight.data = weight
    return chosen


def storable_scales(
    block: nn.Module, fold: Fold, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The scales near ``scale`` (in,) by which a norm, divided, is exact in the model's ``dtype``.

    A file holds the norm's weight less what is added to it, rounded to eight bits: of 1 + weight,
    where that is small, little would be left. The readers take up what rounding does, so nothing is
    lost. A linear before them is not rounded like that, and keeps the scales.
    """
    weight = block.get_parameter(f"{fold.smooth}.weight").data.double()
    if weight.dim() != 1:
        return scale
    weight = weight + fold.offset
    divided = (weight / scale - fold.offset).to(dtype).double() + fold.offset
    found = torch.where(weight == 0, scale, weight / divided)
    # Nothing is left of it: as it was.
    return torch.where(found.isfinite() & (found > 0), found, 1.0).to(scale.dtype)


def _relative_weight(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """Mean of |w| relative to its group's largest, per input channel of all of them: (in,)."""
    total = torch.zeros_like(weights[0][0])
    for weight in weights:
        grouped = weight.abs().view(len(weight), -1, group_size)
        relative = grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-12)
        total += relative.view_as(weight).sum(0)
    return total / sum(map(len, weights))
