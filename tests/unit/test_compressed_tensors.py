"""compressed-tensors that quantkit writes: against the package, by hand, and as it is served."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from safetensors.torch import load_file, save_file

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.engines.transformers.weights import load
from quantkit.errors import CheckpointError, ConversionError, IncompatibleVariant, RecipeError
from quantkit.formats import floats
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.compressed_tensors.activations import round_inputs
from quantkit.formats.compressed_tensors.presets import PRESETS
from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert, plan
from quantkit.quantize.smooth import expected_loss
from tests.models import make_checkpoint

LINEAR = "model.layers.0.mlp.up_proj"
BY_ROUNDING = [
    *("W4A16", "W4A16_ASYM", "W8A16", "W8A8"),
    *("FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Stored in float32: the package computes in the weights' dtype, and so to the bit alike."""
    path = make_checkpoint(tmp_path_factory.mktemp("source") / "m")
    wide = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(wide, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return Checkpoint.open(path)


def _windows(source: Checkpoint) -> Calibration:
    return calibrate(
        load_text("pydoc:calibration"), source.tokenizer, samples=4, sequence_length=64, seed=0
    )


def _made(source: Checkpoint, scheme: str, out: Path, **options: Any) -> Variant:
    spec = Spec.of_entry({"spec": f"compressed-tensors:{scheme}", **options})
    return convert(source, spec, _windows(source), out)


def _scheme(path: Path) -> QuantizationScheme:
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    args = {
        key: QuantizationArgs(**{k: v for k, v in group[key].items() if k != "actorder"})
        for key in ("weights", "input_activations")
        if group[key]
    }
    return QuantizationScheme(targets=group["targets"], format=group["format"], **args)


def _parts(path: Path, linear: str) -> dict[str, torch.Tensor]:
    stored = load_file(path / "model.safetensors")
    return {
        name.removeprefix(f"{linear}."): tensor
        for name, tensor in stored.items()
        if name.startswith(f"{linear}.")
    }


@pytest.mark.parametrize("scheme", BY_ROUNDING)
def test_package_decompresses_to_what_is_unpacked(
    scheme: str, source: Checkpoint, tmp_path: Path
) -> None:
    options = {"smoothing": False} if scheme == "W8A8" else {}  # which would change the weights
    made = _made(source, scheme, tmp_path, **options)
    found = _scheme(made.path)
    compressor = BaseCompressor.get_value_from_registry(str(found.format))
    theirs = compressor.decompress(_parts(made.path, LINEAR), found)["weight"]
    ours = dict(CompressedTensors().dequantize(made))[f"{LINEAR}.weight"]
    assert ours.shape == source.tensors[f"{LINEAR}.weight"].shape
    assert torch.equal(ours.to(theirs.dtype), theirs)
    assert 0 < (ours - source.read(f"{LINEAR}.weight").float()).abs().max() < 0.1


@pytest.mark.parametrize("scheme", BY_ROUNDING)
def test_config_is_the_packages_preset(scheme: str, source: Checkpoint, tmp_path: Path) -> None:
    made = _made(source, scheme, tmp_path, algorithm="rtn")
    ours, theirs = _scheme(made.path), preset_name_to_scheme(scheme, ["Linear"])
    keys = (
        *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"),
        "scale_dtype",
    )
    for one, other in (
        (ours.weights, theirs.weights),
        (ours.input_activations, theirs.input_activations),
    ):
        assert (one is None) == (other is None)
        for key in keys:
            assert getattr(one, key, None) == getattr(other, key, None), key
    assert open_variant(made.path).scheme == scheme
    assert made.path.name == f"ct-{scheme}"
    (made.path / "quantkit.json").unlink()
    assert open_variant(made.path).scheme == scheme  # by what config.json says alone


@pytest.mark.parametrize("scheme", BY_ROUNDING)
def test_rounding_is_the_packages_to_the_bit(
    scheme: str, source: Checkpoint, tmp_path: Path
) -> None:
    made = _made(source, scheme, tmp_path, algorithm="rtn")
    found = preset_name_to_scheme(scheme, ["Linear"])
    assert found.weights is not None
    parts = _parts(made.path, LINEAR)
    weight = source.read(f"{LINEAR}.weight").float()
    args = found.weights
    whole = None
    if scheme.startswith("NVFP4"):
        together = torch.cat([weight, source.read(LINEAR.replace("up", "gate") + ".weight")])
        whole = generate_gparam(together.min(), together.max())
    grouped = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    if args.block_structure:
        high, wide = args.block_structure
        grouped = weight.unflatten(0, (-1, high)).unflatten(2, (-1, wide)).transpose(1, 2)
        grouped = grouped.flatten(2)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args, whole)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if whole is not None:
        state["weight_global_scale"] = whole
    layout = json.loads((made.path / "config.json").read_text())["quantization_config"]["format"]
    theirs = BaseCompressor.get_value_from_registry(layout).compress(state, found)
    if scheme == "NVFP4":  # that of inputs is an observer's, as here
        theirs["input_global_scale"] = parts["input_global_scale"]
    assert parts.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert parts[name].dtype == tensor.dtype, name
        raw = [one.contiguous().view(torch.uint8) for one in (parts[name], tensor)]
        assert torch.equal(*raw), name


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16"])
def test_best_scale_is_nearer_than_the_largest_magnitudes(
    scheme: str, source: Checkpoint, tmp_path: Path
) -> None:
    errors = []
    for algorithm in ("rtn", "best-scale"):
        made = _made(source, scheme, tmp_path / algorithm, algorithm=algorithm)
        weights = dict(CompressedTensors().dequantize(made))
        name = f"{LINEAR}.weight"
        errors.append(float((weights[name] - source.read(name)).square().sum()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    "entry",
    [
        {"scheme": "W4A16", "group_size": 32},
        {"scheme": "W4A16", "group_size": -1},
        {"scheme": "W4A16_ASYM"},
        {"scheme": "W4A16_ASYM", "algorithm": "awq"},
        {"scheme": "W8A8", "smoothing": False},
    ],
    ids=str,
)
def test_gptq_and_awq_lose_less_than_rounding(
    entry: dict[str, Any], source: Checkpoint, tmp_path: Path
) -> None:
    """On the model's own logits, with the inputs left alone."""
    ids = torch.arange(3, 131).view(2, 64)
    with torch.inference_mode():
        wanted = load(source, torch.float32)(ids).logits.log_softmax(-1)

    def loss(variant: Variant) -> float:
        model = load(variant, torch.float32)
        for module in model.modules():
            module._forward_pre_hooks.clear()
        with torch.inference_mode():
            found = model(ids).logits.log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    made = _made(source, out=tmp_path / "made", **entry)
    rounded = _made(source, out=tmp_path / "rtn", **(entry | {"algorithm": "rtn"}))
    assert loss(made) < loss(rounded)
    assert made.manifest is not None
    assert made.manifest.calibration is not None
    assert rounded.manifest is not None
    assert rounded.manifest.calibration is None


def test_smoothing_takes_outliers_out_of_activations(source: Checkpoint, tmp_path: Path) -> None:
    """The same function, whose norms leave a few channels a hundred times as loud as the others."""
    stored = load_file(source.path / "model.safetensors")
    loud = torch.ones(256)
    loud[::64] = 100.0
    for layer in range(2):
        place = f"model.layers.{layer}"
        stored[f"{place}.input_layernorm.weight"] *= loud
        stored[f"{place}.post_attention_layernorm.weight"] *= loud
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            stored[f"{place}.{name}_proj.weight"] /= loud
    path = tmp_path / "loud"
    shutil.copytree(source.path, path)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(3, 131).view(2, 64)
    with torch.inference_mode():
        wanted = load(source, torch.float32)(ids).logits.log_softmax(-1)

    def loss(**options: Any) -> float:
        made = _made(Checkpoint.open(path), "W8A8", tmp_path / str(options), **options)
        with torch.inference_mode():
            found = load(made, torch.float32)(ids).logits.log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    smoothed = loss()
    assert 10 * smoothed < loss(smoothing=False)
    assert 10 * smoothed < loss(algorithm="rtn")


def test_expected_loss_is_what_rounding_loses() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(64, 256), torch.randn(512, 256)
    inputs[:, 3] *= 20
    rounding = PRESETS["W8A8"].activations
    assert rounding is not None
    step = weight.abs().amax(1, keepdim=True) / 127.5
    near = (weight / step).round() * step
    lost = (round_inputs(inputs, rounding) @ near.T - inputs @ weight.T).square().sum()
    assert expected_loss([weight], inputs) == pytest.approx(float(lost), rel=0.1)


def test_plan_knows_the_bytes(source: Checkpoint, tmp_path: Path) -> None:
    for scheme in BY_ROUNDING:
        spec = Spec.of_entry({"spec": f"compressed-tensors:{scheme}", "algorithm": "rtn"})
        planned = plan(source, spec)
        assert planned.needs_calibration == (scheme == "NVFP4")
        windows = _windows(source) if planned.needs_calibration else None
        made = convert(source, spec, windows, tmp_path)
        tensors = load_file(made.path / "model.safetensors").values()
        assert planned.bytes == sum(tensor.nbytes for tensor in tensors)


def test_skipped_linears_and_the_output_layer_are_ignored(
    source: Checkpoint, tmp_path: Path
) -> None:
    made = _made(source, "FP8_DYNAMIC", tmp_path, skip=["down_proj"])
    config = json.loads((made.path / "config.json").read_text())["quantization_config"]
    skipped = [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    assert config["ignore"] == [*skipped, "model.embed_tokens", "lm_head"]
    stored = load_file(made.path / "model.safetensors")
    assert torch.equal(stored[f"{skipped[0]}.weight"], source.read(f"{skipped[0]}.weight"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"spec": "compressed-tensors:W4A61"}, "did you mean 'W4A16'"),
        ({"spec": "compressed-tensors:W8A8", "group_size": 64}, "group_size is for W4A16"),
        ({"spec": "compressed-tensors:W4A16", "group_size": 48}, "expected one of"),
        ({"spec": "compressed-tensors:W4A16", "algorithm": "awq"}, "W4A16 takes gptq, rtn"),
        ({"spec": "compressed-tensors:NVFP4A16", "algorithm": "gptq"}, "takes best-scale, rtn"),
        ({"spec": "compressed-tensors:MXFP4", "algorithm": "gptq"}, "takes rtn, best-scale"),
        ({"spec": "compressed-tensors:W8A8", "algorithm": "rtn", "rounding": "learned"}, "learned"),
        ({"spec": "compressed-tensors:W4A16", "smoothing": True}, "smoothing is for W8A8"),
        (
            {"spec": "compressed-tensors:W8A8", "overrides": {"a": "w4g64"}},
            "unknown scheme 'w4g64'",
        ),
    ],
)
def test_options_that_do_not_fit(entry: dict[str, Any], message: str, source: Checkpoint) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(source, Spec.of_entry(entry))


def test_blocks_that_do_not_fit(tmp_path: Path) -> None:
    source = Checkpoint.open(make_checkpoint(tmp_path / "m", intermediate_size=320))
    with pytest.raises(ConversionError, match=r"blocks of 128 x 128 do not divide 320 x 256"):
        plan(source, Spec.parse("compressed-tensors:FP8_BLOCK"))


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "FP8_BLOCK", "MXFP4"])
def test_inputs_are_rounded_as_the_package_does(scheme: str) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(1, 5, 256) * torch.logspace(-3, 3, 5).view(1, 5, 1)
    args = preset_name_to_scheme(scheme, ["Linear"]).input_activations
    assert args is not None
    scale, zero = compute_dynamic_scales_and_zp(inputs, args, torch.nn.Identity())
    rounding = PRESETS[scheme].activations
    assert rounding is not None
    assert torch.equal(round_inputs(inputs, rounding), fake_quantize(inputs, scale, zero, args))


def test_nvfp4_inputs_are_rounded_as_the_package_does() -> None:
    """With a scale of the whole, which some groups exceed and others are next to nothing below."""
    torch.manual_seed(1)
    inputs = torch.randn(1, 9, 256) * torch.logspace(-6, 2, 9).view(1, 9, 1)
    inputs[0, 3, :32] = 0
    args = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    assert args is not None
    whole = generate_gparam(inputs.min() / 10, inputs.max() / 10)
    scale, zero = compute_dynamic_scales_and_zp(inputs, args, torch.nn.Identity(), whole)
    theirs = fake_quantize(inputs, scale, zero, args, whole)
    rounding = PRESETS["NVFP4"].activations
    assert rounding is not None
    found = round_inputs(inputs, rounding, float(whole))
    assert torch.equal(found, theirs)
    assert found.abs().max() < inputs.abs().max() / 2
    assert found[0, 8].any()
    assert not found[0, 0].any()


def test_global_scales_of_inputs_are_those_of_the_largest_magnitudes(
    source: Checkpoint, tmp_path: Path
) -> None:
    """The package's for what linears are given in transformers with the same weights."""
    windows = replace(_windows(source), precision=torch.float32)
    made = convert(source, Spec.parse("compressed-tensors:NVFP4"), windows, tmp_path)
    stored = load_file(made.path / "model.safetensors")
    model = load(made, torch.float32, exact_inputs=True)
    seen: dict[str, torch.Tensor] = {}

    def watching(name: str) -> Any:
        def watch(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            seen[name] = given[0]

        return watch

    for name, module in model.named_modules():
        if f"{name}.input_global_scale" in stored:
            module.register_forward_pre_hook(watching(name))
    with torch.inference_mode():
        model(windows.ids)
    assert len(seen) == 14
    for name, inputs in seen.items():
        expected = generate_gparam(inputs.min(), inputs.max())
        found = stored[f"{name}.input_global_scale"]
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=1e-4), name
    for layer in range(2):
        for shared in (("q", "k", "v"), ("gate", "up")):
            part = "self_attn" if len(shared) == 3 else "mlp"
            names = [f"model.layers.{layer}.{part}.{one}_proj" for one in shared]
            for scale in ("input_global_scale", "weight_global_scale"):
                assert len({float(stored[f"{name}.{scale}"]) for name in names}) == 1


def test_experts_share_the_scale_of_their_inputs(tmp_path: Path) -> None:
    """Those that no token is given, too; what the last linear is given is another input."""
    path = make_checkpoint(
        tmp_path / "m",
        family="mixtral",
        num_local_experts=16,
        num_experts_per_tok=1,
        intermediate_size=128,
    )
    source = Checkpoint.open(path)
    windows = calibrate(
        load_text("pydoc:calibration"), source.tokenizer, samples=1, sequence_length=8, seed=0
    )
    spec = Spec.parse("compressed-tensors:NVFP4")
    stored = load_file(convert(source, spec, windows, tmp_path).path / "model.safetensors")
    for layer in range(2):
        scales = {
            part: {
                float(scale)
                for name, scale in stored.items()
                if f"layers.{layer}." in name and name.endswith(f".{part}.input_global_scale")
            }
            for part in ("w1", "w2", "w3")
        }
        assert len(scales["w1"]) == 1
        assert scales["w1"] == scales["w3"] != scales["w2"]
        assert len(scales["w2"]) == 1


def test_reference_engine_reads_the_scales_of_inputs(source: Checkpoint, tmp_path: Path) -> None:
    made = _made(source, "NVFP4", tmp_path)
    linear = load(made, torch.float32).get_submodule(LINEAR)
    inputs = torch.randn(1, 3, linear.in_features)
    rounding = PRESETS["NVFP4"].activations
    assert rounding is not None
    whole = float(_parts(made.path, LINEAR)["input_global_scale"])
    expected = torch.nn.functional.linear(round_inputs(inputs, rounding, whole), linear.weight)
    assert torch.equal(linear(inputs), expected)
    file = made.path / "model.safetensors"
    stored = load_file(file)
    del stored[f"{LINEAR}.input_global_scale"]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{LINEAR}.input_global_scale is not there"):
        load(made, torch.float32)


def test_calibration_is_asked_for_where_inputs_have_scales(
    source: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="needs calibration text"):
        convert(source, Spec.parse("compressed-tensors:NVFP4"), None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_int8_inputs_by_a_loop() -> None:
    """As vLLM's kernels: the largest magnitude of a token becomes 127."""
    torch.manual_seed(1)
    inputs = torch.randn(4, 64)
    rounding = PRESETS["W8A8"].activations
    assert rounding is not None
    found = round_inputs(inputs, rounding)
    for row, token in enumerate(inputs):
        scale = token.abs().max() / 127
        for column, value in enumerate(token):
            assert found[row, column] == torch.round(value / scale) * scale


def test_e2m1_values_and_ties() -> None:
    values = torch.tensor([0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 9.0, -0.1, -2.6])
    expected = torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, -0.0, -3.0])
    found = floats.round_e2m1(values)
    assert torch.equal(found, expected)
    assert floats.pack_e2m1(found.view(1, -1)).tolist() == [[0x10, 0x22, 0x44, 0x66, 0x77, 0xD8]]


def test_reference_engine_computes_with_rounded_inputs(source: Checkpoint, tmp_path: Path) -> None:
    made = _made(source, "W8A8", tmp_path, algorithm="rtn")
    model = load(made, torch.float32)
    linear = model.get_submodule(LINEAR)
    inputs = torch.randn(1, 3, linear.in_features)
    rounding = PRESETS["W8A8"].activations
    assert rounding is not None
    expected = torch.nn.functional.linear(round_inputs(inputs, rounding), linear.weight)
    assert torch.equal(linear(inputs), expected)
    head = model.get_output_embeddings()
    assert not head._forward_pre_hooks


def test_static_inputs_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    made = _made(source, "FP8_DYNAMIC", tmp_path, algorithm="rtn")
    file = made.path / "config.json"
    config = json.loads(file.read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"]["dynamic"] = False
    file.write_text(json.dumps(config))
    with pytest.raises(IncompatibleVariant, match="computes dynamic, symmetric"):
        load(made, torch.float32)
