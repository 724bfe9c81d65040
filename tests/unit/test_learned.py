"""Learned rounding: steps by the letter of SignRound, and a block that is nearer to the source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from quantkit.decoder.blocks import DecoderBlocks
from quantkit.formats.integer_linears import Integers
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import GroupScheme
from quantkit.quantize.learned import MOMENTUM, TRAVEL, Learned, LearnedLinear, Start, learn
from quantkit.quantize.rounding import round_to_nearest
from quantkit.quantize.streamed import StreamedBlock

BITS, SIZE = 4, 64


def _nearest(weights: torch.Tensor) -> Start:
    """Symmetric rounding over each group's range, every other group's scale negative."""
    grouped = weights.view(len(weights), -1, SIZE)
    scales = grouped.abs().amax(-1) / 7
    scales[:, ::2] *= -1
    zeros = torch.full_like(scales, 8, dtype=torch.int32)
    return Start(weights, round_to_nearest(weights, scales, zeros, BITS))


def _learn(path: Path, iters: int) -> tuple[Learned, dict[str, Start], StreamedBlock]:
    blocks = DecoderBlocks(Checkpoint.open(path))
    ids = torch.randint(3, 1000, (160, 64), generator=torch.Generator().manual_seed(0))
    module, inputs, source = blocks.load(0), blocks.embed(ids), blocks.embed(ids)
    linears = dict.fromkeys(blocks.linears(0), GroupScheme(BITS, SIZE))
    block = StreamedBlock(blocks, 0, module, linears, inputs, source)
    starts = {
        name: _nearest(module.get_parameter(f"{name}.weight").data) for name in blocks.linears(0)
    }
    target = block.advance_source(module)
    return learn(block, target, starts, iters), starts, block


def test_a_block_learns_to_give_what_the_source_gives(tiny_llama: Path) -> None:
    learned, starts, block = _learn(tiny_llama, iters=20)
    assert learned.error_after < 0.95 * learned.error_before
    assert block.source is not None

    def error(integers: dict[str, Integers]) -> float:
        """Over all windows, in float32 and without the learner's code."""
        module = block.blocks.load(0)
        for name, codes in integers.items():
            module.get_submodule(name).weight = nn.Parameter(codes.dequantize())
        total = 0.0
        with torch.no_grad():
            for batch, wanted in zip(block.inputs, block.source or (), strict=True):
                given = module(batch, **block.blocks.arguments(0, batch.shape[1]))
                total += float((given - wanted).square().mean())
        return total

    assert error(learned.integers) < 0.95 * error({n: s.integers for n, s in starts.items()})
    for name, integers in learned.integers.items():
        before = starts[name].integers
        assert torch.equal(integers.scales, before.scales)
        assert (integers.codes.int() - before.codes.int()).abs().max() <= 1
        # Only what was near the middle between two integers can have moved.
        place = starts[name].weights / before.scales.repeat_interleave(SIZE, 1)
        moved = integers.codes != before.codes
        assert ((place - place.round()).abs()[moved] > 0.5 - TRAVEL - 1e-4).all()


def test_the_same_inputs_give_the_same_integers(tiny_llama: Path) -> None:
    first, *_ = _learn(tiny_llama, iters=3)
    again, *_ = _learn(tiny_llama, iters=3)
    for name, integers in first.integers.items():
        assert torch.equal(integers.codes, again.integers[name].codes)


def test_what_learning_does_not_better_stays(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(linear: LearnedLinear, rate: float) -> None:
        linear.offset.add_(0.3)

    monkeypatch.setattr(LearnedLinear, "step", away)
    learned, starts, _ = _learn(tiny_llama, iters=2)
    assert learned.error_after == learned.error_before
    for name, integers in learned.integers.items():
        assert torch.equal(integers.codes, starts[name].integers.codes)


def test_a_step_is_the_sign_of_the_summed_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(6, 128, generator=generator)
    start = _nearest(weights)
    module = nn.Linear(128, 6, bias=False)
    linear = LearnedLinear(module, start, BITS, torch.float32)
    x = torch.randn(3, 10, 128, generator=generator)
    wanted = x @ weights.T
    scale = start.integers.scales.repeat_interleave(SIZE, 1)
    offset, velocity = torch.zeros(6, 128), torch.zeros(6, 128)
    for batch, target in zip(x, wanted, strict=True):
        # By autograd, through a rounding whose gradient is the identity's.
        place = weights / scale
        parameter = offset.clone().requires_grad_()
        through = place + parameter
        through = through + (through.round() - through).detach()
        loss = (batch @ (through * scale).T - target).square().mean()
        loss.backward()
        assert parameter.grad is not None
        velocity = MOMENTUM * velocity + parameter.grad
        offset = offset - 0.03 * velocity.sign()

        (module(batch) - target).square().mean().backward()
        linear.step(0.03)
        inside = (place.round() >= -8) & (place.round() <= 7)
        assert torch.allclose(linear.offset.view(6, 128)[inside], offset[inside], atol=1e-6)
    codes = ((weights / scale + offset).round() + 8).clamp(0, 15)
    assert torch.equal(linear.codes().float(), codes)
