"""Linears of several schemes in one file: as the package decides and reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from safetensors.torch import load_file

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.engines.transformers.weights import load
from quantkit.errors import IncompatibleVariant, RecipeError
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.compressed_tensors.groups import check_targets, group_of
from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert, plan
from tests.models import make_checkpoint

MIXES: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("W4A16", {"down_proj": "W8A16"}, {}),
    ("W4A16", {"down_proj": "W8A16"}, {"group_size": 64}),
    ("W4A16", {"[qkv]_proj": "W8A8", r"layers\.1\.mlp\.down": "FP8_DYNAMIC"}, {}),
    ("W8A8", {"(gate|up)_proj": "FP8_BLOCK", "o_proj": "MXFP4"}, {}),
    ("FP8_BLOCK", {"down_proj": "FP8_DYNAMIC"}, {}),
    ("NVFP4", {"down_proj": "FP8_DYNAMIC", "o_proj": "NVFP4A16"}, {}),
    ("W4A16_ASYM", {"down_proj": "W8A16"}, {"algorithm": "rtn"}),
]
mixes = pytest.mark.parametrize(("scheme", "overrides", "options"), MIXES, ids=str)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("source") / "m"))


def _windows(source: Checkpoint) -> Calibration:
    return calibrate(
        load_text("pydoc:calibration"), source.tokenizer, samples=4, sequence_length=64, seed=0
    )


def _spec(scheme: str, overrides: dict[str, str], options: dict[str, Any]) -> Spec:
    return Spec.of_entry(
        {"spec": f"compressed-tensors:{scheme}", "overrides": overrides, **options}
    )


@mixes
def test_package_decides_and_decompresses_alike(
    scheme: str,
    overrides: dict[str, str],
    options: dict[str, Any],
    source: Checkpoint,
    tmp_path: Path,
) -> None:
    spec = _spec(scheme, overrides, options)
    planned = plan(source, spec)
    made = convert(source, spec, _windows(source), tmp_path)
    stored = load_file(made.path / "model.safetensors")
    assert planned.bytes == sum(tensor.nbytes for tensor in stored.values())
    config = json.loads((made.path / "config.json").read_text())["quantization_config"]
    theirs = QuantizationConfig.model_validate(config)
    groups = {t: key for key, one in theirs.config_groups.items() for t in one.targets}
    ours = dict(CompressedTensors().dequantize(made))
    dtype, seen = torch.bfloat16, set()
    for name, module in load(source, dtype).named_modules():
        if not isinstance(module, torch.nn.Linear) or name in config["ignore"]:
            continue
        key = groups[match_targets(name, module, groups)[0]]
        assert key == group_of(config["config_groups"], name)
        seen.add(key)
        group = theirs.config_groups[key]
        parts = {
            end.removeprefix(f"{name}."): tensor
            for end, tensor in stored.items()
            if end.startswith(f"{name}.")
        }
        compressor = BaseCompressor.get_value_from_registry(str(group.format))
        weight = compressor.decompress(parts, group)["weight"]
        assert torch.equal(ours[f"{name}.weight"].to(weight.dtype), weight), name
    assert seen == theirs.config_groups.keys()


def _detected(made: Variant) -> str:
    (made.path / "quantkit.json").unlink()
    return open_variant(made.path).scheme


def test_names_and_inputs_of_each_group(source: Checkpoint, tmp_path: Path) -> None:
    made = convert(
        source,
        _spec("W4A16", {"[qkv]_proj": "W8A8", r"layers\.1\.mlp\.down": "FP8_DYNAMIC"}, {}),
        _windows(source),
        tmp_path,
    )
    inputs = CompressedTensors().quantized_inputs(made)
    assert inputs is not None
    told = {name: (one.type, one.strategy) for name, one in inputs.roundings.items()}
    attention = [
        f"model.layers.{layer}.self_attn.{part}_proj.weight"
        for layer in range(2)
        for part in ("q", "k", "v")
    ]
    expected = dict.fromkeys(attention, ("int", "token"))
    assert told == expected | {"model.layers.1.mlp.down_proj.weight": ("float", "token")}
    assert _detected(made) == "W4A16+W8A8+FP8_DYNAMIC"


def test_gptq_makes_up_for_the_errors_of_floats(source: Checkpoint, tmp_path: Path) -> None:
    ids = torch.arange(3, 131).view(2, 64)
    with torch.inference_mode():
        wanted = load(source, torch.float32)(ids).logits.log_softmax(-1)

    def loss(**options: Any) -> float:
        spec = _spec("W4A16", {"o_proj": "MXFP4A16", "down_proj": "FP8_DYNAMIC"}, options)
        made = convert(source, spec, _windows(source), tmp_path / str(options))
        with torch.inference_mode():
            found = load(made, torch.float32, exact_inputs=True)(ids).logits.log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    assert loss() < loss(algorithm="rtn")


def test_names_decide_before_patterns_and_these_before_kinds() -> None:
    groups = {
        "of_kind": {"targets": ["Linear"]},
        "matched": {"targets": ["re:.*_proj"]},
        "named": {"targets": ["model.layers.0.down_proj"]},
    }
    assert group_of(groups, "model.layers.0.down_proj") == "named"
    assert group_of(groups, "model.layers.1.down_proj") == "matched"
    assert group_of(groups, "model.layers.1.router") == "of_kind"
    del groups["of_kind"]
    assert group_of(groups, "model.layers.1.router") is None


@pytest.mark.parametrize("targets", [1e30, "Linear", {"a": 1}, ["re:("], ["Linear", "re:*"]])
def test_targets_that_say_nothing_are_refused(targets: Any) -> None:
    with pytest.raises(IncompatibleVariant, match=r"config.json: group_0.* target"):
        check_targets(targets, "config.json: group_0")


@pytest.mark.parametrize(
    ("scheme", "overrides", "options", "message"),
    [
        ("W4A16", {"q_proj": "W8A16"}, {}, r"they need one scheme: .*q_proj: W8A16, .*: W4A16"),
        ("W4A16", {"gone": "W8A16"}, {}, "found in no linear"),
        ("W4A16", {"down_proj": "w8g64"}, {}, "unknown scheme 'w8g64'"),
        ("W4A16", {"down_proj": "NVFP4"}, {}, "no mix of integers and NVFP4; use algorithm: rtn"),
        ("W4A16_ASYM", {"down_proj": "W8A16"}, {}, "no mix of W4A16_ASYM and symmetric"),
        ("W4A16_ASYM", {"down_proj": "W8A16"}, {"algorithm": "awq"}, "awq scales linears of one"),
        ("W8A8", {"down_proj": "W8A16"}, {"smoothing": True}, "without overrides"),
        ("W8A8", {"down_proj": "FP8_DYNAMIC"}, {"group_size": 64}, "group_size is for W4A16"),
        ("W4A16", {"down_proj": "FP8_DYNAMIC"}, {"algorithm": "awq"}, "takes gptq, rtn, best-"),
    ],
)
def test_mixes_that_cannot_be(
    scheme: str,
    overrides: dict[str, str],
    options: dict[str, Any],
    message: str,
    source: Checkpoint,
) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        plan(source, _spec(scheme, overrides, options))
    assert "\n" not in str(raised.value)


def test_experts_have_the_scheme_of_the_spec(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    source = Checkpoint.open(make_checkpoint(tmp_path / "m", family="qwen3_moe", **sizes))
    with pytest.raises(RecipeError, match="experts have the scheme of the spec"):
        plan(source, _spec("W4A16", {"experts": "W8A16"}, {"algorithm": "rtn"}))
    spec = _spec("W4A16", {"self_attn": "W8A16"}, {"algorithm": "rtn", "group_size": 32})
    config = json.loads((convert(source, spec, None, tmp_path).path / "config.json").read_text())[
        "quantization_config"
    ]
    assert not any("experts" in name for name in config["config_groups"]["group_1"]["targets"])
