"""GPTQ and AWQ of mixtures of experts, each expert for the tokens that it is given."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.structure import fold_scales
from quantkit.engines.transformers.weights import load
from quantkit.engines.vllm import unsupported as refused
from quantkit.errors import IncompatibleVariant, RecipeError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import GroupScheme, Spec
from quantkit.models.variant import Variant
from quantkit.producers import load_producer
from quantkit.producers.convert import convert
from quantkit.quantize.awq import BlockAWQ, Grid, search_scales
from quantkit.quantize.block_gptq import BlockGPTQ
from quantkit.quantize.gptq import gptq as solve
from quantkit.quantize.inputs import InputStatistics
from quantkit.quantize.streamed import StreamedBlock
from tests.block_outputs import exact, on_grid, rounded
from tests.models import make_checkpoint
from tests.plain_weights import plain_weights

COMMON = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
FAMILIES = {
    "qwen3_moe": {
        **COMMON,
        "num_experts": 6,
        "moe_intermediate_size": 64,
        "mlp_only_layers": [1],
    },
    "mixtral": {**COMMON, "num_local_experts": 6},
}
"""Of Qwen3-MoE the first block is a mixture and the second is not."""
SCHEME = GroupScheme(4, 64)
GRID = Grid(4, 64, torch.float32)
IDS = torch.randint(3, 1000, (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("moe") / request.param
    return Checkpoint.open(
        make_checkpoint(directory, family=request.param, **FAMILIES[request.param])
    )


@pytest.fixture(scope="module")
def windows(source: Checkpoint) -> Calibration:
    text = load_text("pydoc:calibration")
    return calibrate(text, source.tokenizer, samples=8, sequence_length=64, seed=0)


@pytest.fixture(scope="module", params=["gptq:w4g64", "awq:w4g64"])
def variant(
    request: pytest.FixtureRequest,
    source: Checkpoint,
    windows: Calibration,
    tmp_path_factory: pytest.TempPathFactory,
) -> Variant:
    out = tmp_path_factory.mktemp("variants")
    return convert(source, Spec.parse(request.param), windows, out)


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[operator, no-any-return]


def test_the_checkpoint_computes_what_transformers_computes(source: Checkpoint) -> None:
    expected = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    torch.testing.assert_close(
        logits(load(source, torch.float32)), logits(expected), rtol=1e-4, atol=1e-4
    )


def test_every_experts_linears_are_packed_under_the_checkpoints_names(
    source: Checkpoint, variant: Variant
) -> None:
    found = dict(plain_weights(variant.path))
    assert {n: t.shape for n, t in found.items()} == {
        name: torch.Size(info.shape) for name, info in source.tensors.items()
    }
    stored = Checkpoint.open(variant.path).tensors
    experts = [name for name in source.tensors if ".experts." in name]
    assert len(experts) == 6 * 3 * (1 if "Qwen3" in source.architecture else 2)
    for name in experts:
        assert f"{name.removesuffix('.weight')}.qweight" in stored
        error = (found[name] - source.read(name).float()).norm() / source.read(name).float().norm()
        assert variant.format == "awq" or error < 0.2
    plan = load_producer(Spec.parse(f"{variant.format}:w4g64")).plan(
        source, Spec.parse(f"{variant.format}:w4g64")
    )
    assert plan.bytes == sum(f.stat().st_size for f in variant.path.glob("*.safetensors")) - sum(
        8 + int.from_bytes(f.read_bytes()[:8], "little") for f in variant.path.glob("*.safetensors")
    )


def divergence(source: Checkpoint, other: object) -> float:
    """Mean KL divergence from the source."""
    wanted = logits(load(source, torch.float32)).log_softmax(-1)
    return float((wanted.exp() * (wanted - logits(other).log_softmax(-1))).sum(-1).mean())


def test_a_mixture_is_nearer_to_its_source_than_rounded_to_nearest(
    source: Checkpoint, variant: Variant
) -> None:
    plain = load(source, torch.float32)
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear) and module is not plain.lm_head:
            module.weight.data = on_grid(module.weight.data, GRID)
    found = divergence(source, load(variant, torch.float32))
    assert 0 < found < 0.9 * divergence(source, plain)


def test_an_engine_is_told_that_routers_are_not_quantized(
    source: Checkpoint, variant: Variant
) -> None:
    config = json.loads((variant.path / "config.json").read_text())["quantization_config"]
    routers = [
        name.removesuffix(".weight") for name in source.tensors if name.endswith(".gate.weight")
    ]
    assert len(routers) == (1 if "Qwen3" in source.architecture else 2)
    if variant.format == "awq":
        assert config["modules_to_not_convert"] == [*routers, "embed_tokens"]
    else:
        escaped = [name.replace(".", r"\.") for name in routers]
        assert config["dynamic"] == {f"-:^(?:{name})$": {} for name in escaped}


def _experts_inputs(source: Checkpoint) -> dict[int, torch.Tensor]:
    """What each expert of the first block is given, by transformers' own router."""
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1)))
    logits(model)
    (hidden,) = seen
    scores = functional.linear(hidden, layer.mlp.gate.weight).softmax(-1)
    chosen = scores.topk(2, dim=-1).indices
    return {expert: hidden[(chosen == expert).any(-1)] for expert in range(6)}


def test_experts_are_solved_for_the_tokens_that_transformers_gives_them(
    source: Checkpoint,
) -> None:
    """The oracle: transformers' router, then GPTQ of each expert for itself."""
    blocks = DecoderBlocks(source, precision=torch.float64)
    hidden = blocks.embed(IDS)
    linears = {name: SCHEME for name in blocks.linears(0) if ".experts." in name}
    streamed = StreamedBlock(blocks, 0, blocks.load(0), linears, hidden, blocks.embed(IDS))
    found = BlockGPTQ(torch.float32)(streamed).integers
    block = blocks.load(0)
    for expert, x in _experts_inputs(source).items():
        assert len(x) > 8
        gate, up = (
            block.get_parameter(f"mlp.experts.{expert}.{leaf}.weight").float()
            for leaf in ("gate_proj", "up_proj")
        )
        expected = solve(
            torch.cat([gate, up]), x.double().T @ x.double(),
            bits=4, group_size=64, dtype=torch.float32,
        ).integers  # fmt: skip
        ours = torch.cat(
            [found[f"mlp.experts.{expert}.{n}"].codes for n in ("gate_proj", "up_proj")]
        )
        assert (ours == expected.codes).float().mean() > 0.999


def test_folding_an_experts_scales_leaves_the_function_and_the_router(source: Checkpoint) -> None:
    blocks = DecoderBlocks(source)
    hidden, block = blocks.embed(IDS), blocks.load(0)
    before = exact(blocks, block, hidden)
    mixture = [fold for fold in blocks.structure(0).folds if "experts" in fold.balance_layers[0]]
    assert len(mixture) == 1 + 6
    statistics = InputStatistics(block, [fold.given for fold in mixture])
    exact(blocks, block, hidden)
    statistics.close()
    for fold in mixture:
        leader = statistics.leader[fold.given]
        hessian = statistics.hessian[leader].float()
        size = statistics.mean_abs[leader]
        scale = search_scales(block, fold, size, hessian, GRID)
        if len(fold.balance_layers) > 1:
            scale = torch.linspace(0.5, 2, len(scale))
        fold_scales(block, fold, scale)
    assert (exact(blocks, block, hidden) - before).abs().max() < 2e-5 * before.abs().max()


@pytest.mark.parametrize("tiles", [True, False])
def test_vllm_wants_amx_for_quantized_experts(
    tiles: bool,
    source: Checkpoint,
    variant: Variant,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = tmp_path / "cpuinfo"
    cpu.write_text("flags: fpu avx512_bf16" + " amx_tile" * tiles)
    monkeypatch.setattr(refused, "_CPU", cpu)
    refused.check_experts(source.config, source)
    config = json.loads((variant.path / "config.json").read_text())
    expected = nullcontext() if tiles else pytest.raises(IncompatibleVariant, match="without AMX")
    with expected:
        refused.check_experts(config, variant)


@pytest.mark.parametrize("format_", ["gptq", "awq"])
def test_experts_that_no_token_reaches_are_named_and_rounded_to_nearest(
    format_: str, source: Checkpoint, windows: Calibration, tmp_path: Path
) -> None:
    """Two experts whose scores the router makes hopeless."""
    closed = tmp_path / "closed"
    closed.mkdir()
    for file in source.path.iterdir():
        (closed / file.name).write_bytes(file.read_bytes())
    state = load_file(closed / "model.safetensors")
    (router, *_) = [
        name
        for name in state
        if name.startswith("model.layers.0.") and name.endswith(".gate.weight")
    ]
    norm = "model.layers.0.post_attention_layernorm.weight"
    # One channel is the same for all tokens, and against two experts.
    state["model.embed_tokens.weight"][:, 0] = 5
    state[norm][0] = 1
    state[router][[1, 4], 0] = -1000
    save_file(state, closed / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(closed)
    made = convert(checkpoint, Spec.parse(f"{format_}:w4g64"), windows, tmp_path / "out")
    assert made.manifest is not None
    (note,) = [n for n in made.manifest.notes if n.startswith("model.layers.0: ")]
    said = re.fullmatch(
        r"model.layers.0: (\d) of 6 experts saw no token and are rounded to nearest \((.*)\); "
        "more calibration text reaches more of them",
        note,
    )
    assert said
    unseen = said[2].split(", ")
    assert {"1", "4"} <= set(unseen)
    assert int(said[1]) == len(unseen) < 5
    for name, weight in plain_weights(made.path):
        if ".experts.4." in name and ".layers.0." in name and format_ == "gptq":
            exact = checkpoint.read(name).float()
            assert (weight - exact).norm() < 0.12 * exact.norm(), name
        assert torch.isfinite(weight).all(), name


def test_experts_have_one_scheme(source: Checkpoint) -> None:
    spec = Spec.parse("gptq:w4g64").having({"overrides": {r"experts\.1\.": "w8g64"}})
    with pytest.raises(RecipeError, match="engines run these as one linear"):
        load_producer(spec).plan(source, spec)
    skipped = Spec.parse("gptq:w4g64").having({"skip": ["experts"]})
    plan = load_producer(skipped).plan(source, skipped)
    assert any("linears are not quantized" in note for note in plan.notes)


def test_rounding_of_experts_is_learned(
    source: Checkpoint, variant: Variant, windows: Calibration, tmp_path: Path
) -> None:
    """An expert that is given no token of a batch has no gradient, and stays as it is."""
    spec = Spec.parse(f"{variant.format}:w4g64").having({"rounding": "learned", "iters": 3})
    learned = load(convert(source, spec, windows, tmp_path), torch.float32)
    closed = load(variant, torch.float32)
    assert divergence(source, learned) < 1.2 * divergence(source, closed)


def test_a_block_of_awq_keeps_what_the_mixture_computes(source: Checkpoint) -> None:
    blocks = DecoderBlocks(source)
    hidden, block = blocks.embed(IDS), blocks.load(0)
    before = exact(blocks, block, hidden)
    linears = dict.fromkeys(blocks.linears(0), SCHEME)
    streamed = StreamedBlock(blocks, 0, block, linears, hidden, blocks.embed(IDS))
    for name, integers in BlockAWQ(torch.float32)(streamed).integers.items():
        block.get_submodule(name).weight.data = integers.dequantize()
    after = exact(blocks, block, hidden)
    plain = exact(blocks, rounded(blocks, GRID), hidden)
    assert (after - before).square().mean() < 0.9 * (plain - before).square().mean()
