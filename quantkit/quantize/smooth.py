"""SmoothQuant: move the outliers of activations into weights, where both are rounded to 8 bits.

Xiao et al. 2022, arXiv 2211.10438. Linears that share an input take the channel scales
s = a**α / w**(1 - α), with a the largest activation of a channel and w its largest weight: the
activations are divided by s, and the weights multiplied. The authors choose one α for a model. Here
each mapping has its own, searched by the loss that is expected when a token is rounded with one
scale, and an output channel with another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quantkit.decoder.structure import Fold, fold_scales
from quantkit.formats.integer_linears import Integers
from quantkit.quantize.awq import storable_scales
from quantkit.quantize.block_gptq import BlockGPTQ
from quantkit.quantize.rounding import QuantizedBlock
from quantkit.quantize.streamed import StreamedBlock, linear_weight

_ALPHAS = 20
_TOKENS = 2048
"""Tokens, taken evenly from all windows, by which α is searched."""


class BlockSmoothed:
    """Quantizes block after block to INT8 weights: smooths the inputs of its linears, then rounds
    as GPTQ does. ``dtype`` and ``iters`` as for ``BlockGPTQ``."""

    def __init__(self, dtype: torch.dtype, iters: int = 0) -> None:
        self._dtype = dtype
        self._round = BlockGPTQ(dtype, iters)

    def __call__(self, block: StreamedBlock) -> QuantizedBlock:
        """The integers of a block's linears. Its norms, and its linears where they feed others,
        take the scales."""
        module = block.module
        given = _sampled_inputs(block, [fold.given for fold in block.folds])
        for fold in block.folds:
            if fold.given in given:  # not of an expert that saw no token
                scale = search_scales(module, fold, given[fold.given])
                fold_scales(module, fold, storable_scales(module, fold, scale, self._dtype))
        return self._round(block, is_source=False)

    def rounded(self, block: StreamedBlock, module: nn.Module) -> dict[str, Integers]:
        """As ``BlockGPTQ.rounded``."""
        return self._round.rounded(block, module)


def search_scales(block: nn.Module, fold: Fold, inputs: torch.Tensor) -> torch.Tensor:
    """Scales of the balance layers' input channels with the least expected loss, (in,).

    ``inputs``: (tokens, in) float32. The first half gives the largest activations, the second
    judges: a channel that was quiet and gets loud, as those behind a gate do, would take the whole
    range of its token once its scale is small.
    """
    weights = [linear_weight(block, name).float() for name in fold.balance_layers]
    channels = fold.channels
    seen, others = inputs.tensor_split(2)
    activation = channels.reduce(seen.abs().amax(0)).clamp(min=1e-5)
    weight = channels.reduce(torch.stack([w.abs().amax(0) for w in weights]).amax(0))
    best = torch.ones(inputs.shape[1], device=inputs.device)
    least = expected_loss(weights, others)
    for step in range(_ALPHAS + 1):
        alpha = step / _ALPHAS
        scale = channels.expand(activation**alpha / weight.clamp(min=1e-5) ** (1 - alpha))
        loss = expected_loss([w * scale for w in weights], others / scale)
        if loss < least:
            least, best = loss, scale
    return best


def expected_loss(weights: Sequence[torch.Tensor], inputs: torch.Tensor) -> float:
    """The squared error of the outputs of ``weights`` (out, in) for ``inputs`` (tokens, in), where
    both are rounded to 8 bits; an error is spread evenly over a step h, and so its mean square is
    h² / 12."""
    token_steps = (inputs.abs().amax(1) / 127).square().sum()
    size = inputs.square().sum()
    loss = torch.zeros((), device=inputs.device)
    for weight in weights:
        steps = (weight.abs().amax(1) / 127.5).square().sum()
        loss += (token_steps * weight.square().sum() + steps * size) / 12
    return float(loss)


def _sampled_inputs(block: StreamedBlock, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """What modules of the block are given, (tokens, in) float32, of some tokens of each batch."""
    every = max(1, block.inputs.tokens // _TOKENS)
    seen: dict[str, list[torch.Tensor]] = {}

    def watching(name: str) -> Any:
        def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            seen.setdefault(name, []).append(rows[::every].float())

        return watch

    hooks = [
        block.module.get_submodule(name).register_forward_pre_hook(watching(name))
        for name in dict.fromkeys(names)
    ]
    try:
        block.run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}
