"""Checkpoints of other packages: each layout against slow loops, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.api import inspect
from quantkit.engines import load_engine
from quantkit.engines.transformers.weights import load
from quantkit.errors import CheckpointError, IncompatibleVariant
from quantkit.formats.compressed_tensors.encodings import unpack as unpack_words
from quantkit.formats.detect import open_model, open_variant
from quantkit.models.checkpoint import Checkpoint
from tests.packed_checkpoints import (
    LINEARS,
    Drawn,
    as_awq,
    as_compressed,
    as_gptq,
    draw,
    write,
)
from tests.plain_weights import plain_weights

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "data_type": "int"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64},
        }
    },
}

Pack = Callable[[Drawn, int], dict[str, torch.Tensor]]


def v1(drawn: Drawn, bits: int) -> dict[str, torch.Tensor]:
    return as_gptq(drawn, bits, stored_less=1, g_idx=True)


def v2(drawn: Drawn, bits: int) -> dict[str, torch.Tensor]:
    return as_gptq(drawn, bits, stored_less=0, g_idx=True)


def v1_without_g_idx(drawn: Drawn, bits: int) -> dict[str, torch.Tensor]:
    return as_gptq(drawn, bits, stored_less=1, g_idx=False)


def v2_without_g_idx(drawn: Drawn, bits: int) -> dict[str, torch.Tensor]:
    return as_gptq(drawn, bits, stored_less=0, g_idx=False)


def awq(drawn: Drawn, _: int) -> dict[str, torch.Tensor]:
    return as_awq(drawn)


def symmetric(drawn: Drawn, bits: int) -> dict[str, torch.Tensor]:
    return as_compressed(drawn, bits, asymmetric=False)


def asymmetric(drawn: Drawn, bits: int) -> dict[str, torch.Tensor]:
    return as_compressed(drawn, bits, asymmetric=True)


def with_g_idx(drawn: Drawn, bits: int) -> dict[str, torch.Tensor]:
    return as_compressed(drawn, bits, asymmetric=True, g_idx=True)


def with_zeros_in_bytes(drawn: Drawn, bits: int) -> dict[str, torch.Tensor]:
    return as_compressed(drawn, bits, asymmetric=True, old_zeros=True)


@pytest.mark.parametrize(
    ("pack", "bits", "quantization", "drawing", "format_"),
    [
        (v1, (4, 8), GPTQ, {}, "gptq"),
        (v1, (3, 2), GPTQ | {"checkpoint_format": "gptq"}, {}, "gptq"),
        (v2, (4, 4), GPTQ | {"checkpoint_format": "gptq_v2"}, {}, "gptq"),
        (v1, (4, 4), GPTQ | {"desc_act": True}, {"shuffled": True}, "gptq"),
        (v2, (4, 8), GPTQ | {"checkpoint_format": "gptq_v2"}, {"shuffled": True}, "gptq"),
        (v1_without_g_idx, (4, 8), AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}, {},
         "gptq"),
        (v1_without_g_idx, (4, 4), AUTO_ROUND | {"backend": "auto_round:gptq:exllamav2"}, {},
         "gptq"),
        (v2_without_g_idx, (5, 4), AUTO_ROUND | {"packing_format": "auto_round"}, {}, "gptq"),
        (v2, (4, 4), AUTO_ROUND | {"packing_format": "auto_round:gptqmodel"}, {}, "gptq"),
        (awq, (4, 4), AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, {}, "awq"),
        (awq, (4, 4), AWQ, {}, "awq"),
        (symmetric, (4, 8), COMPRESSED, {"symmetric": True}, "compressed-tensors"),
        (asymmetric, (4, 8), COMPRESSED, {}, "compressed-tensors"),
        (with_g_idx, (4, 4), COMPRESSED, {"shuffled": True}, "compressed-tensors"),
        (with_zeros_in_bytes, (4, 8), COMPRESSED, {}, "compressed-tensors"),
    ],
)  # fmt: skip
def test_each_layout_against_slow_loops(
    pack: Pack,
    bits: tuple[int, int],
    quantization: dict[str, Any],
    drawing: dict[str, bool],
    format_: str,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    source = Checkpoint.open(tiny_llama)
    drawn, parts = {}, {}
    for linear, width in zip(LINEARS, bits, strict=True):
        outputs, inputs = source.tensors[f"{linear}.weight"].shape
        groups = inputs // 64 if linear == LINEARS[0] else 1
        drawn[linear] = draw((outputs, inputs), width, groups, **drawing)
        parts[linear] = pack(drawn[linear], width)
    variant = open_variant(write(tiny_llama, tmp_path / "theirs", parts, quantization))
    assert (variant.id, variant.format, variant.scheme) == ("theirs", format_, "w4g64")
    plain = dict(plain_weights(variant.path))
    assert plain.keys() == source.tensors.keys()
    for name, tensor in plain.items():
        linear = name.removesuffix(".weight")
        expected = drawn[linear].weight() if linear in drawn else source.read(name)
        assert torch.equal(tensor, expected), name


def test_compressed_tensors_by_hand() -> None:
    """Codes 0 to 7 of 4 bits stand for -8 to -1; a zero point of 9 (stored) is 1."""
    packed = torch.tensor([[0x76543210]], dtype=torch.int32)
    scale, shape = torch.tensor([[0.5]]), torch.tensor([1, 8])
    unpack = unpack_words
    plain = unpack(packed, scale, shape, weight_zero_point=None, weight_g_idx=None)
    assert plain.tolist() == [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]]
    zero = torch.tensor([[9]], dtype=torch.int32)  # of one row; seven more would fit in
    shifted = unpack(
        packed.expand(8, 1),
        scale.expand(8, 1),
        torch.tensor([8, 8]),
        weight_zero_point=zero,
        weight_g_idx=None,
    )
    assert shifted[0].tolist() == [-4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0]
    assert shifted[1].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


def theirs(source: Path, directory: Path, pack: Pack, quantization: dict[str, Any]) -> Path:
    shape = Checkpoint.open(source).tensors[f"{LINEARS[0]}.weight"].shape
    return write(source, directory, {LINEARS[0]: pack(draw(shape, 4, 4), 4)}, quantization)


def test_it_is_inspected_and_scored_like_any_other(tiny_llama: Path, tmp_path: Path) -> None:
    """A bias of zeros that the model has no place for is what some packages write."""
    path = theirs(tiny_llama, tmp_path / "theirs", asymmetric, COMPRESSED)
    facts = inspect(str(path))
    assert facts["kind"] == "weights without a manifest"
    assert (facts["format"], facts["quantized_linears"]) == ("compressed-tensors", 1)
    variant = open_variant(path)
    load_engine("transformers").check(variant)
    model = load(variant, torch.float32)
    weight = model.get_submodule(LINEARS[0]).weight
    assert torch.equal(weight, draw(tuple(weight.shape), 4, 4).weight())


@pytest.mark.parametrize("zero", [True, False])
def test_a_bias_that_the_model_has_not(zero: bool, tiny_llama: Path, tmp_path: Path) -> None:
    shape = Checkpoint.open(tiny_llama).tensors[f"{LINEARS[0]}.weight"].shape
    parts = v1(draw(shape, 4, 4), 4) | {
        "bias": torch.zeros(shape[0]) if zero else torch.ones(shape[0])
    }
    variant = open_variant(write(tiny_llama, tmp_path / "theirs", {LINEARS[0]: parts}, GPTQ))
    if zero:
        load(variant, torch.float32)
    else:
        with pytest.raises(CheckpointError, match=r"k_proj\.bias .* has no such tensor"):
            load(variant, torch.float32)


def altered(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(COMPRESSED)
    *into, last = path
    place = config
    for key in into:
        place = place[key]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            GPTQ | {"checkpoint_format": "marlin"},
            r"checkpoint_format is 'marlin'; quantkit unpacks",
        ),
        (AUTO_ROUND | {"data_type": "mx_fp"}, r"data_type is 'mx_fp'; quantkit unpacks 'int'"),
        (AWQ | {"version": "gemv_fast"}, r"version is 'gemv_fast'; quantkit unpacks 'gemm'"),
        (
            altered(("format",), "marlin-24"),
            r"group_0 has format 'marlin-24', which quantkit does not decode",
        ),
        (altered(("quantization_status",), "frozen"), r"quantization_status is 'frozen'"),
        (altered(("kv_cache_scheme",), {"num_bits": 8}), r"has a kv_cache_scheme, which quantkit"),
        (altered(("transform_config",), {"config_groups": {}}), r"has a transform_config"),
        (
            altered(("config_groups", "group_0", "input_activations"), {"num_bits": 8}),
            r"input_activations: quantkit computes dynamic, symmetric INT8 and FP8",
        ),
        (
            altered(("config_groups", "group_0", "weights", "strategy"), "block"),
            r"group_0 has strategy 'block'; quantkit reads group, channel, tensor",
        ),
        (
            altered(("config_groups", "group_0", "weights", "num_bits"), 3),
            r"group_0 has 3 bits; quantkit reads 2, 4 and 8",
        ),
    ],
)
def test_what_is_not_read_is_said_in_a_line(
    quantization: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    pack = {"gptq": v1, "auto-round": v1, "awq": awq, "compressed-tensors": symmetric}
    variant = open_variant(
        theirs(tiny_llama, tmp_path / "theirs", pack[quantization["quant_method"]], quantization)
    )
    with pytest.raises(IncompatibleVariant, match=message):
        load(variant, torch.float32)


def test_a_method_that_is_not_read(tiny_llama: Path, tmp_path: Path) -> None:
    path = theirs(tiny_llama, tmp_path / "theirs", v1, {"quant_method": "hqq"})
    for opens in (open_variant, open_model):
        with pytest.raises(
            IncompatibleVariant, match=r"quant_method is 'hqq'; quantkit reads 'gptq'"
        ):
            opens(path)


def test_parts_that_do_not_fit_together(tiny_llama: Path, tmp_path: Path) -> None:
    path = theirs(tiny_llama, tmp_path / "theirs", v1_without_g_idx, GPTQ)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = AWQ
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"k_proj: its parts do not fit together \(qweight \["
    ):
        load(open_variant(path), torch.float32)
