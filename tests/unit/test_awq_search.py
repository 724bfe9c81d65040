"""AWQ: folding changes nothing, and what is searched for is really lower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantkit.decoder.activations import Activations
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.structure import Fold, fold_scales
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import GroupScheme
from quantkit.quantize.awq import BlockAWQ, Grid, search_scales, storable_scales
from quantkit.quantize.gptq import gptq, remaining_variances
from quantkit.quantize.inputs import InputStatistics
from quantkit.quantize.streamed import StreamedBlock
from tests.block_outputs import exact, rounded

GRID = Grid(4, 64, torch.float32)


@pytest.fixture(params=["tiny_llama", "tiny_qwen2"])
def blocks(request: pytest.FixtureRequest) -> DecoderBlocks:
    return DecoderBlocks(Checkpoint.open(request.getfixturevalue(request.param)))


def _hidden(blocks: DecoderBlocks) -> Activations:
    generator = torch.Generator().manual_seed(0)
    return blocks.embed(torch.randint(3, 1000, (4, 64), generator=generator))


def test_folding_scales_leaves_the_function_in_float32(blocks: DecoderBlocks) -> None:
    hidden, block = _hidden(blocks), blocks.load(0)
    before = exact(blocks, block, hidden)
    statistics = InputStatistics(block, blocks.linears(0))
    exact(blocks, block, hidden)
    statistics.close()
    changed = 0
    for fold in blocks.structure(0).folds:
        leader = statistics.leader[fold.given]
        scale = search_scales(
            block,
            fold,
            statistics.mean_abs[leader],
            statistics.hessian[leader].float(),
            GRID,
        )
        changed += not torch.equal(scale, torch.ones_like(scale))
        fold_scales(block, fold, scale)
    after = exact(blocks, block, hidden)
    assert changed == 4
    assert (after - before).abs().max() < 2e-5 * before.abs().max()


def test_a_block_quantized_with_awq_is_nearer_than_rounded_to_nearest(
    blocks: DecoderBlocks,
) -> None:
    hidden, block = _hidden(blocks), blocks.load(0)
    wanted = exact(blocks, block, hidden)
    plain = rounded(blocks, GRID)
    linears = dict.fromkeys(blocks.linears(0), GroupScheme(4, 64))
    streamed = StreamedBlock(blocks, 0, block, linears, hidden, _hidden(blocks))
    for name, integers in BlockAWQ(torch.float32)(streamed).integers.items():
        block.get_submodule(name).weight.data = integers.dequantize()

    def error(candidate: nn.Module) -> float:
        return float((exact(blocks, candidate, hidden) - wanted).square().mean())

    assert error(block) < 0.75 * error(plain)


def _made(rescaled: bool) -> tuple[nn.Module, torch.Tensor]:
    """A linear and the Hessian of correlated inputs; rescaled: its channels by random factors."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(192, 192, generator=generator) / 192**0.5 + torch.eye(192)
    inputs = torch.randn(2048, 192, generator=generator) @ mixed
    weight = torch.randn(48, 192, generator=generator)
    factors = torch.exp(torch.randn(192, generator=generator) * rescaled)
    linear = nn.Linear(192, 48, bias=False).requires_grad_(False)
    linear.weight.data = weight * factors
    return nn.ModuleDict({"balance": linear}), inputs / factors


def _lost(weight: torch.Tensor, inputs: torch.Tensor, scale: torch.Tensor) -> float:
    """By GPTQ itself, after these scales: ‖X (W - Ŵ)ᵀ‖²."""
    hessian = (inputs / scale).double().T @ (inputs / scale).double()
    settings = {"bits": 4, "group_size": 64, "dtype": torch.float32, "symmetric": False}
    solved = gptq(weight * scale, hessian, **settings, damp_percent=0.01)  # type: ignore[arg-type]
    return float((inputs @ (weight - solved.integers.dequantize() / scale).T).square().sum())


@pytest.mark.parametrize("rescaled", [False, True])
def test_scales_are_those_after_which_gptq_loses_little(rescaled: bool) -> None:
    block, inputs = _made(rescaled)
    weight = block.get_parameter("balance.weight").data
    fold = Fold("norm", ("balance",))
    scale = search_scales(block, fold, inputs.abs().mean(0), inputs.T @ inputs, GRID)
    unscaled = _lost(weight, inputs, torch.ones(192))
    # What scales cannot make better is left alone, and what was scaled is undone.
    assert _lost(weight, inputs, scale) < (0.4 if rescaled else 1.02) * unscaled
    naive = inputs.abs().mean(0).sqrt()  # α = ½, as for rounding
    assert _lost(weight, inputs, scale) < 1.02 * _lost(weight, inputs, naive)


def test_remaining_variances_are_what_later_channels_do_not_explain() -> None:
    _, inputs = _made(rescaled=True)
    inputs = inputs.double()
    hessian = inputs.T @ inputs
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(192, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True)
    found = remaining_variances(hessian)
    for place, column in enumerate(order):
        later = order[place + 1 :]
        across = damped[column, later]
        explained = across @ torch.linalg.solve(damped[later][:, later], across)
        assert found[column] == pytest.approx(float(damped[column, column] - explained), rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_folded_norm_survives_its_dtype(offset: float) -> None:
    """A bf16 norm, also of 1 + weight: as stored, with its balance layers, it gives the same."""
    generator = torch.Generator().manual_seed(0)
    fold = Fold("norm", ("balance",), offset=offset)

    def block() -> nn.Module:
        made = nn.ModuleDict({"norm": nn.LayerNorm(512, bias=False), "balance": nn.Linear(512, 8)})
        return made.requires_grad_(False)

    given = torch.randn(64, 512, generator=generator)
    norm = (torch.rand(512, generator=generator) * 4 - offset).bfloat16().float()
    balance = torch.randn(8, 512, generator=generator) / 512**0.5
    norm[:3] = torch.tensor([-offset, 1e-30 - offset, 3.0])
    scale = torch.exp(torch.randn(512, generator=generator) * 1.5)

    def error(scale: torch.Tensor) -> float:
        one = block()
        one.norm.weight.data, one.balance.weight.data = norm.clone(), balance.clone()
        fold_scales(one, fold, scale)
        stored = one.norm.weight.bfloat16().double() + offset
        found = (given.double() * stored) @ one.balance.weight.double().T
        wanted = (given.double() * (norm.double() + offset)) @ balance.double().T
        return float((found - wanted).norm() / wanted.norm())

    one = block()
    one.norm.weight.data = norm.clone()
    kept = storable_scales(one, fold, scale, torch.bfloat16)
    assert error(kept) < 1e-5
    assert error(scale) > 1e-3
    # It is still the scale that was asked for, but where little would be left of the norm.
    assert ((kept / scale).log().abs() < 0.01).float().mean() > 0.7
