"""What the first block of a checkpoint gives, as it is and rounded to nearest."""

from __future__ import annotations

import torch
from torch import nn

from quantkit.decoder.activations import Activations
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.quantize.awq import Grid


def exact(blocks: DecoderBlocks, block: nn.Module, hidden: Activations) -> torch.Tensor:
    """The output of ``block``, the first one or a copy of it, in float32 throughout."""
    with torch.no_grad():
        return torch.cat([block(batch, **blocks.arguments(0, batch.shape[1])) for batch in hidden])


def rounded(blocks: DecoderBlocks, grid: Grid) -> nn.Module:
    """The first block with every linear rounded to nearest."""
    block = blocks.load(0)
    for name in blocks.linears(0):
        linear = block.get_submodule(name)
        linear.weight.data = grid.fake(linear.weight.data)
    return block
