"""What the first block of a checkpoint gives, as it is and rounded to nearest."""

from __future__ import annotations

import torch
from torch import nn

from quantkit.decoder.activations import Activations
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.quantize.awq import Grid
from quantkit.quantize.rounding import plain_asymmetric


def exact(blocks: DecoderBlocks, block: nn.Module, hidden: Activations) -> torch.Tensor:
    """The output of ``block``, the first one or a copy of it, in float32 throughout."""
    with torch.no_grad():
        return torch.cat([block(batch, **blocks.arguments(0, batch.shape[1])) for batch in hidden])


def on_grid(weights: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weights (out, in) rounded to nearest over each group's full range."""
    return plain_asymmetric(weights, grid.bits, grid.group_size, grid.dtype).dequantize()


def rounded(blocks: DecoderBlocks, grid: Grid) -> nn.Module:
    """The first block with every linear rounded to nearest."""
    block = blocks.load(0)
    for name in blocks.linears(0):
        linear = block.get_submodule(name)
        linear.weight.data = on_grid(linear.weight.data, grid)
    return block
