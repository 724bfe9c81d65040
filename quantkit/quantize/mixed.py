"""Blocks of which GPTQ rounds some linears to integers, and others become floats of fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from quantkit.formats.integer_linears import Floats, Integers
from quantkit.models.spec import GroupScheme
from quantkit.quantize.block_gptq import BlockGPTQ
from quantkit.quantize.rounding import QuantizedBlock
from quantkit.quantize.streamed import StreamedBlock, linear_weight

RoundFloats = Callable[[torch.Tensor, GroupScheme], Floats | None]
"""From the weight of a linear and its scheme; None where the scheme is one of integers."""


class BlockMixed:
    """Quantizes block after block: floats first, which depend on no text, then integers, which
    make up for the errors of both."""

    def __init__(self, integers: BlockGPTQ, floats: RoundFloats) -> None:
        self._integers, self._floats = integers, floats

    def __call__(self, block: StreamedBlock) -> QuantizedBlock:
        """The integers and floats of a block's linears."""
        floats = self._rounded_floats(block, block.module)
        weights = {name: one.weight for name, one in floats.items()}
        found = self._integers(_without(block, floats), given=weights)
        return replace(found, integers={**found.integers, **floats})

    def rounded(self, block: StreamedBlock, module: nn.Module) -> dict[str, Integers | Floats]:
        """As ``BlockGPTQ.rounded``; floats are the same in both."""
        floats = self._rounded_floats(block, module)
        return {**self._integers.rounded(_without(block, floats), module), **floats}

    def _rounded_floats(self, block: StreamedBlock, module: nn.Module) -> dict[str, Floats]:
        found = {
            name: self._floats(linear_weight(module, name), scheme)
            for name, scheme in block.linears.items()
        }
        return {name: one for name, one in found.items() if one is not None}


def _without(block: StreamedBlock, names: dict[str, Floats]) -> StreamedBlock:
    linears = {name: scheme for name, scheme in block.linears.items() if name not in names}
    return replace(block, linears=linears)
