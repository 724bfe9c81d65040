"""Quantized checkpoints as sources: values against transformers and compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.engines.transformers.weights import load
from quantkit.errors import CheckpointError, IncompatibleVariant
from quantkit.formats import decoding, load_format
from quantkit.formats.base import Dequantizes
from quantkit.formats.decoded import open_decoded
from quantkit.formats.detect import open_model, open_source
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert, plan
from tests.models import make_checkpoint

LINEAR = "model.layers.0.mlp.up_proj"
FP8 = torch.float8_e4m3fn


def _quantized(path: Path, settings: dict[str, Any], *, block: int | None = None) -> Path:
    """A tiny Llama whose block linears are stored in FP8, with scales of blocks or of rows."""
    make_checkpoint(path)
    file = path / "model.safetensors"
    made = {}
    for name, weight in load_file(file).items():
        if not name.endswith("proj.weight"):
            made[name] = weight
            continue
        size = (block, block) if block else (1, weight.shape[1])
        grid = weight.float().unfold(0, size[0], size[0]).unfold(1, size[1], size[1])
        scale = grid.abs().amax((-1, -2)) / 448
        scale = scale if block else scale.bfloat16()
        spread = scale.float().repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
        made[name] = (weight.float() / spread).to(FP8)
        made[name + ("_scale_inv" if block else "_scale")] = scale
    save_file(made, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return path


def _fp8(path: Path) -> Path:
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return _quantized(path, settings, block=128)


def _channels(path: Path) -> Path:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    return _quantized(
        path,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
        },
    )


def _plain(quantized: Path, path: Path) -> Checkpoint:
    """The same model stored plainly, decoded by a loop over rows and columns of scales."""
    make_checkpoint(path)
    stored = load_file(quantized / "model.safetensors")
    made = {}
    for name, weight in stored.items():
        scale = stored.get(name + "_scale_inv", stored.get(name + "_scale"))
        if "_scale" in name:
            continue
        if scale is None:
            made[name] = weight
            continue
        out = weight.float()
        high, wide = (a // b for a, b in zip(weight.shape, scale.shape, strict=True))
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                rows = slice(row * high, row * high + high)
                columns = slice(column * wide, column * wide + wide)
                out[rows, columns] *= scale[row, column].float()
        made[name] = out.bfloat16()
    save_file(made, path / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(path)


@pytest.mark.parametrize("make", [_fp8, _channels])
def test_decoded_source_is_the_plain_model(make: Any, tmp_path: Path) -> None:
    source = open_source(make(tmp_path / "model"))
    plain = _plain(source.path, tmp_path / "plain")
    assert source.tensors.keys() == plain.tensors.keys()
    for name, info in plain.tensors.items():
        assert (source.tensors[name].shape, source.tensors[name].dtype) == (info.shape, info.dtype)
        assert torch.equal(source.read(name), plain.read(name)), name
    assert "quantization_config" not in source.config
    assert "quantized already" in " ".join(plan(source, Spec.parse("gguf:Q8_0")).notes)


@pytest.mark.parametrize("make", [_fp8, _channels])
def test_decoded_source_gives_the_gguf_of_the_plain_model(make: Any, tmp_path: Path) -> None:
    source = open_source(make(tmp_path / "model"))
    made = convert(source, Spec.parse("gguf:Q8_0"), None, tmp_path / "a")
    (tmp_path / "b").mkdir()
    plain = _plain(source.path, tmp_path / "b" / "model")
    theirs = convert(plain, Spec.parse("gguf:Q8_0"), None, tmp_path / "b" / "out")
    assert made.weights.read_bytes() == theirs.weights.read_bytes()


def test_decoded_source_is_measured_as_the_plain_model(tmp_path: Path) -> None:
    source = open_model(_fp8(tmp_path / "model"))
    plain = _plain(source.path, tmp_path / "plain")
    assert isinstance(source, Checkpoint)
    ids = torch.arange(3, 40).unsqueeze(0)
    ours, theirs = (load(model, torch.float32)(ids).logits for model in (source, plain))
    assert torch.equal(ours, theirs)


def test_scaled_is_what_transformers_decodes() -> None:
    weight = torch.randn(256, 384).to(FP8)
    for scale in (torch.rand(2, 3), torch.rand(2, 3).bfloat16()):
        theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
        assert torch.equal(decoding.scaled(weight, scale, block=(128, 128)).bfloat16(), theirs)


def test_scaled_cuts_off_the_last_blocks() -> None:
    weight, scale = torch.ones(3, 5).to(FP8), torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    expected = [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert decoding.scaled(weight, scale, block=(2, 2)).tolist() == expected


def test_mxfp4_is_what_transformers_decodes() -> None:
    blocks = torch.randint(0, 256, (3, 64, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 64, 4), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales)
    ours = decoding.mxfp4(blocks, scales).bfloat16()
    assert torch.equal(ours, theirs)


def test_decoded_stacks_of_experts_have_plain_names(tmp_path: Path) -> None:
    path = _quantized(tmp_path / "m", {"quant_method": "mxfp4"})
    stack = "model.layers.0.mlp.experts.down_proj"
    blocks = torch.randint(0, 256, (3, 64, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 64, 4), dtype=torch.uint8)
    save_file({f"{stack}_blocks": blocks, f"{stack}_scales": scales}, path / "model.safetensors")
    source = open_decoded(path)
    assert {name: info.shape for name, info in source.tensors.items()} == {stack: (3, 128, 64)}
    assert torch.equal(source.read(stack), convert_moe_packed_tensors(blocks, scales))


def test_decoded_packed_rows_may_end_in_a_gap(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    path = _quantized(tmp_path / "m", settings)
    words = torch.tensor([[*[0x76543210] * 4, 0x00000F21]], dtype=torch.int32)  # 35 integers
    parts = {
        "weight_packed": words,
        "weight_scale": torch.tensor([[0.5]]).bfloat16(),
        "weight_shape": torch.tensor([1, 35]),
    }
    state = {f"{LINEAR}.{part}": tensor for part, tensor in parts.items()}
    save_file(state, path / "model.safetensors")
    source = open_decoded(path)
    assert source.tensors[f"{LINEAR}.weight"].shape == (1, 35)
    expected = [[(n - 8) / 2 for n in (*[*range(8)] * 4, 1, 2, 15)]]
    assert source.read(f"{LINEAR}.weight").tolist() == expected


def test_nvfp4_by_hand() -> None:
    packed = torch.tensor([[0x21, 0xF7]], dtype=torch.uint8)  # 0.5 1 | 6 -6
    scale, whole = torch.tensor([[2.0, 4.0]]).to(FP8), torch.tensor([8.0])
    assert decoding.nvfp4(packed, scale, whole).tolist() == [[0.125, 0.25, 3.0, -3.0]]


def test_nvfp4_is_what_compressed_tensors_decodes() -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    packed = torch.randint(0, 256, (8, 32), dtype=torch.uint8)
    theirs = unpack_fp4_from_uint8(packed, 8, 64, dtype=torch.float32)
    assert torch.equal(decoding._halves(packed), theirs)


def test_nvfp4_is_what_its_compressor_decodes() -> None:
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    packed = torch.randint(0, 256, (8, 32), dtype=torch.uint8)
    scale, whole = torch.rand(8, 4).mul(400).to(FP8), torch.tensor([37.5])
    settings = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}
    scheme = QuantizationScheme(targets=["Linear"], weights=settings)
    theirs = NVFP4PackedCompressor.decompress(parts, scheme)["weight"]
    ours = decoding.nvfp4(packed, scale, whole).to(theirs.dtype)
    assert torch.equal(ours, theirs)


def test_channel_scales_are_what_compressed_tensors_applies() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    weight, scale = torch.randn(16, 64).to(FP8), torch.rand(16, 1).bfloat16()
    settings = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    theirs = dequantize(x_q=weight, scale=scale, args=settings)
    assert torch.equal(decoding.scaled(weight, scale, block=None).bfloat16(), theirs)


@pytest.mark.parametrize("spec", ["gptq:w4g64", "gptq:w8g32", "awq:w4g64"])
def test_decoded_gives_what_the_format_unpacks(spec: str, tmp_path: Path) -> None:
    made = _packed(spec, tmp_path)
    source = open_decoded(made.path)
    format_ = load_format(made.format)
    assert isinstance(format_, Dequantizes)
    expected = dict(format_.dequantize(made))
    assert source.tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert source.tensors[name].dtype == "BF16"
        assert torch.equal(source.read(name), weight.bfloat16()), name
    again = convert(source, Spec.parse("gguf:BF16"), None, tmp_path / "again")
    assert again.weights.is_file()


def test_decoded_source_becomes_gptq(tmp_path: Path) -> None:
    source = open_source(_fp8(tmp_path / "model"))
    made = convert(source, Spec.parse("gptq:w4g64"), _windows(source), tmp_path / "out")
    plain = _plain(source.path, tmp_path / "plain")
    theirs = convert(plain, Spec.parse("gptq:w4g64"), _windows(plain), tmp_path / "theirs")
    ours, expected = (Checkpoint.open(variant.path) for variant in (made, theirs))
    assert ours.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(ours.read(name), expected.read(name)), name
    assert ours.config["quantization_config"]["quant_method"] == "gptq"


def _windows(source: Checkpoint) -> Calibration:
    text = load_text("pydoc:calibration")
    return calibrate(text, source.tokenizer, samples=4, sequence_length=64, seed=0)


def _packed(spec: str, path: Path) -> Variant:
    source = Checkpoint.open(make_checkpoint(path / "model"))
    return convert(source, Spec.parse(spec), _windows(source), path / "packed")


def _edit(path: Path, **tensors: torch.Tensor | None) -> None:
    file = path / "model.safetensors"
    state = load_file(file)
    for end, tensor in tensors.items():
        state.pop(f"{LINEAR}.{end}")
        if tensor is not None:
            state[f"{LINEAR}.{end}"] = tensor
    save_file(state, file, {"format": "pt"})


def test_decoded_refuses_a_missing_scale(tmp_path: Path) -> None:
    _edit(_fp8(tmp_path / "m"), weight_scale_inv=None)
    with pytest.raises(CheckpointError, match=rf"{LINEAR}.weight has no {LINEAR}.weight_scale_inv"):
        open_decoded(tmp_path / "m")


def test_decoded_refuses_scales_of_another_shape(tmp_path: Path) -> None:
    _edit(_fp8(tmp_path / "m"), weight_scale_inv=torch.ones(5, 2))
    with pytest.raises(CheckpointError, match=rf"{LINEAR}: .* fit together .*\[5, 2\]"):
        open_decoded(tmp_path / "m")


def test_decoded_refuses_an_unknown_method(tmp_path: Path) -> None:
    path = _quantized(tmp_path / "m", {"quant_method": "quip"})
    with pytest.raises(IncompatibleVariant, match="quant_method is 'quip'"):
        open_decoded(path)
