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
            None,
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


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_folded_norm_survives_its_dtype(offset: float) -> None:
    """By a norm of bf16, also of 1 + weight: what is stored and the readers give the same again."""
    generator = torch.Generator().manual_seed(0)
    fold = Fold("norm", ("reader",), offset=offset)

    def block() -> nn.Module:
        made = nn.ModuleDict({"norm": nn.LayerNorm(512, bias=False), "reader": nn.Linear(512, 8)})
        return made.requires_grad_(False)

    given = torch.randn(64, 512, generator=generator)
    norm = (torch.rand(512, generator=generator) * 4 - offset).bfloat16().float()
    reader = torch.randn(8, 512, generator=generator) / 512**0.5
    norm[:3] = torch.tensor([-offset, 1e-30 - offset, 3.0])
    scale = torch.exp(torch.randn(512, generator=generator) * 1.5)

    def error(scale: torch.Tensor) -> float:
        one = block()
        one.norm.weight.data, one.reader.weight.data = norm.clone(), reader.clone()
        fold_scales(one, fold, scale)
        stored = one.norm.weight.bfloat16().double() + offset
        found = (given.double() * stored) @ one.reader.weight.double().T
        wanted = (given.double() * (norm.double() + offset)) @ reader.double().T
        return float((found - wanted).norm() / wanted.norm())

    one = block()
    one.norm.weight.data = norm.clone()
    kept = storable_scales(one, fold, scale, torch.bfloat16)
    assert error(kept) < 1e-5
    assert error(scale) > 1e-3
    # It is still the scale that was asked for, but where little would be left of the norm.
    assert ((kept / scale).log().abs() < 0.01).float().mean() > 0.7
