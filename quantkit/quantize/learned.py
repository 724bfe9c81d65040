"""Learned rounding: which way each weight rounds, judged by the output of the whole block.

SignRound (Cheng et al. 2023, arXiv 2309.05516; AutoRound is its authors' implementation): an
offset of at most half a step is added to each weight before rounding, and learned by the sign of
the gradient through the block, as if rounding were the identity. Here learning does not start from
rounding to nearest but from what GPTQ or AWQ decided, so that small steps do, and the scales stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.decoder.activations import Activations
from quantkit.formats.integer_linears import Integers
from quantkit.quantize.streamed import StreamedBlock
from quantkit.system.stopwatch import stage

TRAVEL = 0.1
"""The farthest that an offset can go, in steps of the grid. Longer ways are noise, since every
weight moves equally fast, whatever its gradient."""
MOMENTUM = 0.9
_BATCH_TOKENS = 2048
_JUDGEMENTS = 4
"""How often the block is compared on windows that it does not learn from; the best one stays."""


@dataclass(frozen=True)
class Start:
    """Where learning begins: ``weights`` (out, in) float32 that ``integers`` are the rounding of.

    After GPTQ these are not the source's weights, but include what makes up for the errors of
    others."""

    weights: torch.Tensor
    integers: Integers


@dataclass(frozen=True)
class Learned:
    """The integers by linear, and the error of the block's output before and after."""

    integers: dict[str, Integers]
    error_before: float
    error_after: float


def learn(
    block: StreamedBlock, target: Activations, starts: Mapping[str, Start], iters: int
) -> Learned:
    """Learn the rounding of all linears of a block together, for the mean squared error of its
    output against ``target``: what it gives in the source.

    Windows are drawn by a seed of the block's own: the result depends
    on nothing but the inputs.
    """
    blocks, module, inputs = block.blocks, block.module, block.inputs
    dtype = torch.bfloat16 if blocks.precision == torch.bfloat16 else blocks.wide
    linears = {
        name: LearnedLinear(module.get_submodule(name), start, block.linears[name].bits, dtype)
        for name, start in starts.items()
    }
    taught = max(1, len(inputs) - 1)  # batches; the last one only judges
    judge = len(inputs) - 1

    def error() -> float:
        with torch.no_grad():
            output = blocks.run(block.index, module, inputs.batch(judge))
            return float((output - target.batch(judge)).square().mean())

    first = best = error()
    kept = {name: linear.codes() for name, linear in linears.items()}
    generator = torch.Generator().manual_seed(block.index)
    windows = inputs.windows(taught)
    batch = max(1, min(windows, _BATCH_TOKENS // inputs.shape[1]))
    every = max(1, iters // _JUDGEMENTS)
    for step in range(iters):
        chosen = torch.randperm(windows, generator=generator)[:batch]
        with stage("forward"), torch.enable_grad():
            output = blocks.compute(block.index, module, inputs.pick(chosen))
            loss = (output - target.pick(chosen)).square().mean()
        with stage("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        rate = TRAVEL * (iters - step) / (iters * (iters + 1) / 2)
        for linear in linears.values():
            linear.step(rate)
        left = iters - 1 - step
        if left == 0 or (left < iters // 2 and left % every == 0):
            found = error()
            if found < best:
                best = found
                kept = {name: linear.codes() for name, linear in linears.items()}
    for linear in linears.values():
        linear.close()
    integers = {
        name: Integers(kept[name], start.integers.scales, start.integers.zeros)
        for name, start in starts.items()
    }
    return Learned(integers, first, best)


class LearnedLinear:
    """One linear while its rounding is learned; its module holds the rounded weight, whose
    gradient sums up with momentum. ``offset``: (out, groups, group_size), in steps of the grid."""

    def __init__(self, module: nn.Module, start: Start, bits: int, dtype: torch.dtype) -> None:
        self._module, self._before = module, module.weight
        self._top = (1 << bits) - 1
        integers = start.integers
        out = len(integers.codes)
        grouped = (out, -1, integers.group_size)
        self._scales = integers.scales.unsqueeze(-1)
        self._zeros = integers.zeros.unsqueeze(-1)
        self._place = start.weights.view(grouped) / self._scales
        self.offset = torch.zeros_like(self._place)
        self._weight = nn.Parameter(
            torch.empty(start.weights.shape, dtype=dtype, device=start.weights.device)
        )
        module.weight = self._weight
        self._round()

    def codes(self) -> torch.Tensor:
        """The integers as they are now, (out, in) uint8."""
        return self._codes().byte().view_as(self._weight)

    def step(self, rate: float) -> None:
        """Move every offset by ``rate`` against the sign of its gradient, and round again."""
        gradient = self._weight.grad
        if gradient is None:
            return  # an expert that no token was given yet
        direction = gradient.sign().view_as(self._place) * self._scales.sign()
        self.offset.sub_(direction, alpha=rate)
        gradient.mul_(MOMENTUM)
        self._round()

    def close(self) -> None:
        """Give the module its weight back."""
        self._module.weight = self._before

    def _codes(self) -> torch.Tensor:
        return (self._place + self.offset).round_().add_(self._zeros).clamp_(0, self._top)

    def _round(self) -> None:
        weight = (self._codes() - self._zeros) * self._scales
        self._weight.data.copy_(weight.view_as(self._weight))
