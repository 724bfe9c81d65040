"""How strongly activations are smoothed, and by which text that is decided."""

from __future__ import annotations

import torch
from torch import nn

from quantkit.decoder.structure import Fold
from quantkit.quantize.smooth import expected_loss, search_scales

FOLD = Fold("norm", ("balance",))


def _block() -> nn.Module:
    block = nn.Module()
    block.norm = nn.RMSNorm(192)
    block.balance = nn.Linear(192, 64, bias=False)
    return block


def test_channels_that_are_always_loud_are_smoothed() -> None:
    torch.manual_seed(0)
    block, inputs = _block(), torch.randn(512, 192)
    inputs[:, ::24] *= 100
    scale = search_scales(block, FOLD, inputs)
    weight = block.get_parameter("balance.weight").data
    assert expected_loss([weight * scale], inputs / scale) < 0.1 * expected_loss([weight], inputs)


def test_what_helps_only_the_tokens_that_it_was_taken_from_is_left_out() -> None:
    """Each token has one loud channel, as behind a gate, and none is loud in both halves."""
    torch.manual_seed(0)
    block, inputs = _block(), torch.randn(192, 192)
    inputs[torch.arange(192), torch.arange(192)] *= 100
    weight = block.get_parameter("balance.weight").data
    seen, others = inputs.tensor_split(2)
    fitted = seen.abs().amax(0) ** 0.5 / weight.abs().amax(0) ** 0.5
    assert expected_loss([weight * fitted], seen / fitted) < expected_loss([weight], seen)
    assert expected_loss([weight * fitted], others / fitted) > expected_loss([weight], others)
    assert torch.equal(search_scales(block, FOLD, inputs), torch.ones(192))
