"""GPTQ of a decoder block: each linear for what those before it, quantized, give it now."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from quantkit.decoder.expert_names import expert_of, is_routed
from quantkit.formats.integer_linears import Integers
from quantkit.models.spec import GroupScheme
from quantkit.quantize.gptq import DAMP_PERCENT, Kernels, Solved, gptq, refit
from quantkit.quantize.inputs import (
    InputStatistics,
    Reached,
    add_correction,
    add_gram,
    dead_channels,
    empty_gram,
)
from quantkit.quantize.learned import Start, learn
from quantkit.quantize.passes import Passes
from quantkit.quantize.rounding import QuantizedBlock, plain_asymmetric, plain_symmetric
from quantkit.quantize.streamed import StreamedBlock, linear_weight, unseen_note
from quantkit.system.stopwatch import stage

_HESSIAN_BYTES = 2 << 30
"""Bytes of the Hessians of experts that are summed at the same time."""


class BlockGPTQ:
    """Quantizes block after block, and in each the linears in the order of their calls, every one
    for what those before it give now. ``dtype`` and ``symmetric`` as for ``gptq``. With ``iters``,
    that many steps of learning follow (``quantize/learned.py``)."""

    def __init__(self, dtype: torch.dtype, iters: int = 0, *, symmetric: bool = True) -> None:
        self._dtype, self._iters, self._symmetric = dtype, iters, symmetric
        self._kernels = Kernels()

    def __call__(
        self,
        block: StreamedBlock,
        *,
        is_source: bool = True,
        given: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> QuantizedBlock:
        """The integers of a block's linears. ``is_source``: whether it is the source's to the
        bit, not only what it computes. ``given``: the weights of other linears, rounded already,
        whose errors these make up for."""
        source_block = _sharing_weights(block.module)
        for name, weight in given.items():
            _give(block.module, name, weight)
        starts: dict[str, Start] = {}
        notes: list[str] = []
        groups = _sharing_inputs(block)
        shared = [names for names in groups if not is_routed(names[0])]
        writers = block.structure.writers
        # Where several share an input, each would make up for all that the stream lacks.
        streams = {one: writers[one] for one, *more in shared if one in writers and not more}
        at = [names[0] for names in shared], streams
        with (
            Passes(block.module, block.inputs, block.run_batch, *at) as now,
            Passes(source_block, block.source, block.run_batch, *at) as before,
        ):
            for names in shared:
                reached = now.reach(names[0]), before.reach(names[0])
                weights = _stacked(source_block, names)
                solved = self._solve(block, weights, names, zip(*reached, strict=True))
                notes += self._notes(f"{block.name}.{names[0]}", solved)
                starts |= _take(block.module, names, solved)
            if is_source:
                before.finish()
        unseen: set[str] = set()
        routed = [names for names in groups if is_routed(names[0])]
        for names, hessian in _routed(block, routed):
            solved = self._gptq(block, names, _stacked(block.module, names), hessian)
            if hessian is None:
                unseen.add(expert_of(names[0]))
            else:
                notes += self._notes(f"{block.name}.{names[0]}", solved)
            starts |= _take(block.module, names, solved)
        notes += unseen_note(block, unseen)
        if not is_source:  # as an attempt that goes on does it, for the same bits
            block.advance_source(block.blocks.load(block.index))
        if self._iters:
            learned = learn(block, block.source, starts, self._iters)
            return QuantizedBlock(learned.integers, tuple(notes))
        return QuantizedBlock({name: s.integers for name, s in starts.items()}, tuple(notes))

    def rounded(self, block: StreamedBlock, module: nn.Module) -> dict[str, Integers]:
        """The linears of ``module``, a copy of the block, rounded to nearest on the same grid."""
        plain = plain_symmetric if self._symmetric else plain_asymmetric
        found = {}
        for name, scheme in block.linears.items():
            weight = linear_weight(module, name)
            size = scheme.columns(weight.shape[1])
            found[name] = plain(weight.float(), scheme.bits, size, self._dtype)
        return found

    def _solve(
        self,
        block: StreamedBlock,
        weights: torch.Tensor,
        names: list[str],
        pairs: Iterable[tuple[Reached, Reached]],
    ) -> Solved:
        """Linears with one input have one Hessian: they are solved stacked.

        ``pairs``: what they are given now, and in the source, batch by batch.
        """
        hessian = lost = behind = torch.empty(0)
        for number, (given, exact) in enumerate(pairs):
            with stage("hessian"):
                if number == 0:
                    hessian, lost = empty_gram(given.inputs), empty_gram(given.inputs)
                    behind = torch.zeros_like(weights, dtype=hessian.dtype)
                add_gram(hessian, given.inputs, given.inputs)
                add_correction(lost, exact.inputs - given.inputs, given.inputs)
                if exact.stream is not None and given.stream is not None:
                    add_correction(behind, exact.stream - given.stream, given.inputs)
        lacking = (weights.to(lost.dtype) @ lost).add_(behind)
        del lost, behind
        weights = refit(weights, hessian, lacking, block.inputs.tokens)
        del lacking
        return self._gptq(block, names, weights, hessian)

    def _gptq(
        self,
        block: StreamedBlock,
        names: Sequence[str],
        weights: torch.Tensor,
        hessian: torch.Tensor | None,
    ) -> Solved:
        """``gptq`` of linears with one input; without a Hessian every column counts alike, and so
        each is rounded to nearest."""
        if hessian is None:
            hessian = torch.eye(weights.shape[1], device=weights.device)
        dead_channels(hessian.diagonal(), f"{block.name}.{names[0]}")
        scheme = block.linears[names[0]]
        return gptq(
            weights,
            hessian,
            bits=scheme.bits,
            group_size=scheme.columns(weights.shape[1]),
            dtype=self._dtype,
            symmetric=self._symmetric,
            kernels=self._kernels,
        )

    def _notes(self, where: str, solved: Solved) -> Iterator[str]:
        if solved.dead_channels:
            yield f"{where}: {solved.dead_channels} dead input channels"
        if solved.damp_percent != DAMP_PERCENT:
            yield f"{where}: damping raised to {solved.damp_percent:.2f}"


def _sharing_weights(module: nn.Module) -> nn.Module:
    """A copy that keeps the weights which the module has now, without copies of them."""
    return copy.deepcopy(module, {id(weight): weight for weight in module.parameters()})


def _sharing_inputs(block: StreamedBlock) -> list[list[str]]:
    """The linears to quantize in the order of their calls, those with one input and one scheme
    together."""
    found: list[list[str]] = []
    for group in block.structure.inputs:
        alike: dict[GroupScheme, list[str]] = {}
        for name in group:
            if name in block.linears:
                alike.setdefault(block.linears[name], []).append(name)
        found += alike.values()
    place = {name: number for number, name in enumerate(block.structure.calls)}
    return sorted(found, key=lambda names: place[names[0]])


def _routed(
    block: StreamedBlock, groups: Sequence[list[str]]
) -> Iterator[tuple[list[str], torch.Tensor | None]]:
    """Linears of experts that share their input, and the Hessian of it, None where an expert is
    given no token.

    Experts work side by side, so the windows run once for all of them, or once for as many as have
    their Hessians in memory; what takes the output of others comes after these were quantized.
    """
    experts: dict[str, list[list[str]]] = {}
    for names in groups:
        experts.setdefault(expert_of(names[0]), []).append(names)
    for alike in zip(*experts.values(), strict=True):
        width = linear_weight(block.module, alike[0][0]).shape[1]
        at_once = max(1, _HESSIAN_BYTES // (4 * width * width))
        for start in range(0, len(alike), at_once):
            some = alike[start : start + at_once]
            statistics = InputStatistics(block.module, [names[0] for names in some])
            block.run()
            statistics.close()
            for names in some:
                yield names, statistics.hessian.pop(names[0], None)


def _take(module: nn.Module, names: Sequence[str], solved: Solved) -> dict[str, Start]:
    """Give linears that were solved stacked the weights that they have from now on."""
    taken, start = {}, 0
    for name in names:
        rows = slice(start, start + len(linear_weight(module, name)))
        integers = solved.integers.rows(rows.start, rows.stop)
        taken[name] = Start(solved.wanted[rows], integers)
        _give(module, name, integers.dequantize())
        start = rows.stop
    return taken


def _give(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Another weight, and not other values of the one that a copy of the module may share."""
    linear: Any = module.get_submodule(name)
    linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=False)


def _stacked(module: nn.Module, names: Sequence[str]) -> torch.Tensor:
    return torch.cat([linear_weight(module, name) for name in names])
