"""GPTQ and AWQ checkpoints: what is written can be read back by the letter of the layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.errors import ConversionError, IncompatibleVariant, QuantkitError, RecipeError
from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant, verify
from quantkit.producers.convert import convert, plan
from tests.models import make_checkpoint
from tests.plain_weights import plain_weights

SPECS = ("gptq:w4g64", "gptq:w8g128", "gptq:w4g-1", "awq:w4g32", "awq:w4g128")


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path) -> Calibration:
    text = load_text("pydoc:calibration")
    tokenizer = Checkpoint.open(tiny_llama).tokenizer
    return calibrate(text, tokenizer, samples=8, sequence_length=64, seed=0)


@pytest.fixture(scope="module")
def made(
    tiny_llama: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Variant]:
    out, source = tmp_path_factory.mktemp("variants"), Checkpoint.open(tiny_llama)
    return {spec: convert(source, Spec.parse(spec), calibration, out) for spec in SPECS}


def _nibble(word: int, slot: int, bits: int) -> int:
    return (word >> (bits * slot)) & ((1 << bits) - 1)


def test_gptq_file_by_the_letter_of_the_layout(made: dict[str, Variant]) -> None:
    path = made["gptq:w4g64"].path
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    qweight, qzeros, scales, g_idx = (
        tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    assert (qweight.dtype, list(qweight.shape)) == (torch.int32, [512 // 8, 256])
    assert (qzeros.dtype, list(qzeros.shape)) == (torch.int32, [8, 256 // 8])
    assert (scales.dtype, list(scales.shape)) == (torch.float16, [8, 256])
    assert g_idx.tolist() == [i // 64 for i in range(512)]
    plain = dict(plain_weights(path))[f"{name}.weight"]
    for row, column in ((0, 0), (7, 255), (130, 31), (511, 200)):
        code = _nibble(qweight[row // 8, column].item(), row % 8, 4)
        zero = _nibble(qzeros[row // 64, column // 8].item(), column % 8, 4) + 1
        assert zero == 8
        expected = (code - zero) * scales[row // 64, column].float().item()
        assert plain[column, row].item() == expected


def test_awq_file_by_the_letter_of_the_layout(made: dict[str, Variant]) -> None:
    path = made["awq:w4g32"].path
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    qweight, qzeros, scales = (tensors[f"{name}.{p}"] for p in ("qweight", "qzeros", "scales"))
    assert list(qweight.shape) == [256, 128 // 8]
    assert list(qzeros.shape) == [8, 128 // 8]
    assert list(scales.shape) == [8, 128]
    plain = dict(plain_weights(path))[f"{name}.weight"]
    slot_of = {column: slot for slot, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
    for row, column in ((0, 0), (255, 127), (100, 9), (31, 62)):
        slot = slot_of[column % 8]
        code = _nibble(qweight[row, column // 8].item(), slot, 4)
        zero = _nibble(qzeros[row // 32, column // 8].item(), slot, 4)
        expected = (code - zero) * scales[row // 32, column].float().item()
        assert plain[column, row].item() == expected


@pytest.mark.parametrize("spec", SPECS)
def test_the_plain_state_dict_has_the_sources_names_and_shapes(
    spec: str, made: dict[str, Variant], tiny_llama: Path
) -> None:
    plain = dict(plain_weights(made[spec].path))
    source = Checkpoint.open(tiny_llama)
    assert {n: tuple(t.shape) for n, t in plain.items()} == {
        n: info.shape for n, info in source.tensors.items()
    }
    # Scales may move between layers in AWQ; GPTQ leaves each weight near where it was.
    if spec.startswith("gptq"):
        for name in source.tensors:
            w = source.read(name).float()
            bound = 0.3 if spec.endswith("g-1") else 0.2
            assert (plain[name].float() - w).norm() < bound * w.norm(), name


@pytest.mark.parametrize("spec", SPECS)
def test_plan_knows_the_bytes(spec: str, made: dict[str, Variant], tiny_llama: Path) -> None:
    planned = plan(Checkpoint.open(tiny_llama), Spec.parse(spec))
    tensors = load_file(made[spec].path / "model.safetensors")
    assert planned.bytes == sum(t.nbytes for t in tensors.values())
    manifest = made[spec].manifest
    assert manifest is not None
    assert manifest.bits_per_weight == planned.bits_per_weight


def test_the_manifest_says_how_far_each_block_moved(made: dict[str, Variant]) -> None:
    errors = {}
    for spec, variant in made.items():
        assert variant.manifest is not None
        errors[spec] = [block.calibration.error for block in variant.manifest.blocks]
        assert len(errors[spec]) == 2
    assert all(0.01 < error < 0.3 for error in errors["gptq:w4g64"])
    # Eight bits err a sixteenth of what four do.
    assert max(errors["gptq:w8g128"]) < 0.2 * min(errors["gptq:w4g64"])


def test_bits_per_weight_of_the_quantized_linears_by_hand(made: dict[str, Variant]) -> None:
    manifest = made["awq:w4g32"].manifest
    assert manifest is not None
    # 4 bits, and per 32 weights one 4-bit zero and one 16-bit scale.
    assert manifest.bits_per_weight_quantized == 4 + (4 + 16) / 32


def test_tokenizer_files_are_copied_and_config_gains_one_key(
    made: dict[str, Variant], tiny_llama: Path
) -> None:
    for variant in made.values():
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (tiny_llama / name).exists():
                assert (variant.path / name).read_bytes() == (tiny_llama / name).read_bytes()
        config = json.loads((variant.path / "config.json").read_text())
        quantization = config.pop("quantization_config")
        assert config == json.loads((tiny_llama / "config.json").read_text())
        if variant.format == "gptq":
            beside = json.loads((variant.path / "quantize_config.json").read_text())
            assert beside == quantization


def test_verify_sees_any_change(made: dict[str, Variant], tmp_path: Path) -> None:
    source = made["gptq:w4g64"].path
    copy = tmp_path / "gptq-w4g64"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert verify(open_variant(copy)) == []
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    (copy / "tokenizer.json").unlink()
    (copy / "added.txt").write_text("x")
    assert verify(open_variant(copy)) == [
        "model.safetensors: sha256 differs",
        "tokenizer.json: missing",
        "added.txt: not in the manifest",
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gptq:w4g63", r"unknown scheme 'w4g63'.*did you mean 'w4g64'\?"),
        ("gptq:w3g128", r"unknown scheme 'w3g128'; gptq takes w4g32, .*w8g128"),
        ("awq:w4g-1", r"unknown scheme 'w4g-1'; awq takes w4g32, w4g64, w4g128"),
    ],
)
def test_unknown_schemes_are_named(spec: str, message: str, tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(Checkpoint.open(tiny_llama), Spec.parse(spec))


def test_group_size_that_does_not_divide_names_the_layer_and_what_would(tmp_path: Path) -> None:
    path = make_checkpoint(
        tmp_path / "odd", hidden_size=192, head_dim=64, num_attention_heads=3, num_key_value_heads=1
    )
    with pytest.raises(
        ConversionError,
        match=r"group_size 128 does not divide in_features 192 "
        r"\(model\.layers\.0\.\S+_proj\); use 32 or 64",
    ):
        plan(Checkpoint.open(path), Spec.parse("gptq:w4g128"))


def test_linears_of_widths_that_kernels_do_not_take_are_left_and_named_by_the_plan(
    tmp_path: Path,
) -> None:
    path = make_checkpoint(tmp_path / "odd", intermediate_size=528)
    for spec in ("gptq:w4g-1", "gptq:w8g-1"):
        notes = plan(Checkpoint.open(path), Spec.parse(spec)).notes
        assert any(
            note.startswith(
                "6 linears are not quantized, as no kernel takes their widths: model.la"
            )
            for note in notes
        ), notes


@pytest.mark.parametrize("spec", ["gptq:w4g64", "awq:w4g64"])
def test_dead_channels_are_named_in_the_manifest(
    spec: str, calibration: Calibration, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][:3] = 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    variant = convert(Checkpoint.open(path), Spec.parse(spec), calibration, tmp_path / "out")
    assert variant.manifest is not None
    assert variant.manifest.notes == ["model.layers.1.self_attn.q_proj: 3 dead input channels"]
    assert all(torch.isfinite(tensor).all() for _, tensor in plain_weights(variant.path))


@pytest.mark.parametrize("spec", ["gptq:w4g64", "awq:w4g64"])
def test_a_source_that_gives_no_finite_values_is_refused(
    spec: str, calibration: Calibration, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7] = 3e38  # finite, and its products are not
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConversionError, match=r"model\.layers\.1 gives values that are not finite before"
    ):
        convert(Checkpoint.open(path), Spec.parse(spec), calibration, tmp_path / "out")


def test_a_failed_conversion_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs calibration"):
        convert(Checkpoint.open(tiny_llama), Spec.parse("awq:w4g64"), None, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_stopped_before_it_had_its_name_it_is_made_as_if_nothing_had_been(
    tiny_llama: Path,
    calibration: Calibration,
    made: dict[str, Variant],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quantkit.producers.convert.settle", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(Checkpoint.open(tiny_llama), Spec.parse("awq:w4g32"), calibration, tmp_path)
    (left,) = tmp_path.iterdir()
    assert (left / "quantkit.json").is_file()
    again = convert(Checkpoint.open(tiny_llama), Spec.parse("awq:w4g32"), calibration, tmp_path)
    assert again.manifest is not None
    whole = made["awq:w4g32"].manifest
    assert whole is not None
    assert again.manifest.files == whole.files
    assert verify(again) == []


def test_an_existing_variant_is_not_overwritten_unless_forced(
    tiny_llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    source, spec = Checkpoint.open(tiny_llama), Spec.parse("gptq:w4g64")
    first = convert(source, spec, calibration, tmp_path)
    before = (first.path / "quantkit.json").read_bytes()
    with pytest.raises(QuantkitError, match="exists already"):
        convert(source, spec, calibration, tmp_path)
    assert (first.path / "quantkit.json").read_bytes() == before
    again = convert(source, spec, calibration, tmp_path, force=True)
    assert again.manifest is not None
    assert first.manifest is not None
    # The same tokens give the same weights, to the bit.
    name = "model.safetensors"
    assert again.manifest.files[name] == first.manifest.files[name]
    assert [p.name for p in tmp_path.iterdir()] == ["gptq-w4g64"]


def test_packed_checkpoints_that_cannot_be_unpacked_are_refused(
    made: dict[str, Variant], tmp_path: Path
) -> None:
    for file in made["awq:w4g32"].path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleVariant, match=r"version is 'gemv'.*'gemm'"):
        dict(plain_weights(tmp_path))
    config["quantization_config"]["version"] = "gemm"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(QuantkitError, match=r"layers\.0\.mlp\.up_proj has no scales"):
        dict(plain_weights(tmp_path))


def test_skipped_linears_and_other_schemes_by_the_tensors_in_the_file(
    tiny_llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny_llama)
    entry = {
        "spec": "gptq:w4g64",
        "skip": [r"layers\.0\.mlp\.(gate|up)"],
        "overrides": {r"layers\.1\.mlp\.down_proj": "w8g32"},
    }
    spec = Spec.of_entry(entry)
    planned = plan(source, spec)
    assert planned.notes == (
        "2 linears are not quantized: model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj",
    )
    variant = convert(source, spec, calibration, tmp_path)
    tensors = load_file(variant.path / "model.safetensors")
    assert planned.bytes == sum(t.nbytes for t in tensors.values())
    for name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(tensors[name], source.read(name))
    assert list(tensors["model.layers.1.mlp.down_proj.qweight"].shape) == [512 // 4, 256]
    assert list(tensors["model.layers.1.mlp.down_proj.scales"].shape) == [512 // 32, 256]
    assert list(tensors["model.layers.0.mlp.down_proj.qweight"].shape) == [512 // 8, 256]
    config = json.loads((variant.path / "config.json").read_text())["quantization_config"]
    assert sorted(config["dynamic"].values(), key=len) == [{}, {"bits": 8, "group_size": 32}]

    plain = dict(plain_weights(variant.path))
    assert plain.keys() == source.tensors.keys()
    eight = "model.layers.1.mlp.down_proj.weight"
    four = "model.layers.0.mlp.down_proj.weight"
    error = {n: (plain[n] - source.read(n).float()).norm() / plain[n].norm() for n in (eight, four)}
    assert error[eight] < 0.5 * error[four]
    assert variant.manifest is not None
    assert variant.manifest.spec["overrides"] == entry["overrides"]
    assert variant.manifest.spec["skip"] == entry["skip"]


def test_awq_says_which_linears_it_left(
    tiny_llama: Path, calibration: Calibration, tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny_llama)
    spec = Spec.of_entry({"spec": "awq:w4g64", "skip": "o_proj"})
    variant = convert(source, spec, calibration, tmp_path)
    config = json.loads((variant.path / "config.json").read_text())["quantization_config"]
    kept = [f"model.layers.{index}.self_attn.o_proj" for index in (0, 1)]
    assert config["modules_to_not_convert"] == ["o_proj", "embed_tokens"]
    plain = dict(plain_weights(variant.path))
    for name in kept:
        assert torch.equal(plain[f"{name}.weight"], source.read(f"{name}.weight"))


@pytest.mark.parametrize("scheme", ["awq:w4g64"])
def test_learned_rounding_is_no_farther_and_in_the_manifest(
    scheme: str, tiny_llama: Path, made: dict[str, Variant], tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny_llama)
    text = load_text("pydoc:calibration")
    windows = calibrate(text, source.tokenizer, samples=192, sequence_length=64, seed=0)
    errors = {}
    for rounding in ({}, {"rounding": "learned", "iters": 12}):
        name = f"variant-{len(rounding)}"
        spec = Spec.of_entry({"spec": scheme, "name": name, **rounding})
        manifest = convert(source, spec, windows, tmp_path).manifest
        assert manifest is not None
        errors[len(rounding)] = manifest.blocks[0].calibration.error
        for key, value in rounding.items():
            assert manifest.spec[key] == value
    assert errors[2] <= errors[0]  # what it starts from may be best
