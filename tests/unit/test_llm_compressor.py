"""llm-compressor as a producer: recipes, what is refused, and what it writes is not trusted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import toolchains
from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.errors import ConversionError, RecipeError
from quantkit.formats.compressed_tensors.presets import PRESETS
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant, verify
from quantkit.producers.convert import convert, plan
from quantkit.producers.llm_compressor import LLMCompressor
from quantkit.toolchains import Toolchain
from tests.models import make_checkpoint

LINEAR = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A toolchain that is this very environment."""
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path_factory.mktemp("home")))
    toolchain = Toolchain(
        name="llm-compressor",
        version="0.0.1",
        device="cpu",
        directory=Path(sys.prefix),
        pip=(),
        packages={"torch": "2", "transformers": "5"},
    )
    monkeypatch.setattr(toolchains, "find", lambda name: toolchain)


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path) -> Calibration:
    tokenizer = Checkpoint.open(tiny_llama).tokenizer
    text = load_text("pydoc:calibration")
    return calibrate(text, tokenizer, samples=3, sequence_length=16, seed=5)


def _spec(scheme: str, **options: Any) -> Spec:
    entry = {"spec": f"compressed-tensors:{scheme}", "producer": "llm-compressor", **options}
    return Spec.of_entry(entry)


_GPTQ = {"algorithm": "gptq", "dampening_frac": 0.01}
_AWQ = {"algorithm": "awq", "duo_scaling": "both"}


@pytest.mark.parametrize(
    ("scheme", "given", "held"),
    [
        ("W4A16", {}, _GPTQ | {"group_size": 128}),
        ("W4A16", {"group_size": -1}, _GPTQ | {"group_size": -1}),
        ("W4A16", {"algorithm": "rtn", "group_size": 32}, {"algorithm": "rtn", "group_size": 32}),
        ("W4A16_ASYM", {}, _AWQ | {"group_size": 128}),
        ("W8A16", {"dampening_frac": 0.1}, _GPTQ | {"group_size": 128, "dampening_frac": 0.1}),
        ("W8A8", {}, _GPTQ | {"smoothing": True, "smoothing_strength": 0.8}),
        ("W8A8", {"smoothing": False}, _GPTQ | {"smoothing": False}),
        ("W8A8", {"algorithm": "awq", "duo_scaling": True},
         {"algorithm": "awq", "duo_scaling": True, "smoothing": False}),
        ("W8A8", {"algorithm": "rtn"}, {"algorithm": "rtn", "smoothing": False}),
        ("W8A8", {"algorithm": "rtn", "smoothing": True, "smoothing_strength": 0.5},
         {"algorithm": "rtn", "smoothing": True, "smoothing_strength": 0.5}),
        *((name, {}, {"algorithm": "rtn"}) for name, one in PRESETS.items() if not one.is_integer),
    ],
    ids=str,
)  # fmt: skip
def test_the_recipe_that_each_scheme_gets(
    scheme: str, given: dict[str, Any], held: dict[str, Any], tiny_llama: Path
) -> None:
    source = Checkpoint.open(tiny_llama)
    planned = plan(source, _spec(scheme, **given))
    assert {key: value for key, value in planned.options.items() if value is not None} == held
    calibrates = held["algorithm"] != "rtn" or held.get("smoothing", False)
    # The scale of NVFP4's whole inputs is stored, and so comes from text.
    assert planned.needs_calibration == (calibrates or scheme == "NVFP4")
    size = {"group_size": given["group_size"]} if "group_size" in given else {}
    native = plan(source, Spec.of_entry({"spec": f"compressed-tensors:{scheme}", **size}))
    assert planned.bytes == native.bytes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (_spec("W4A17"), r"unknown scheme 'W4A17'; .* takes W4A16, .*MXFP4; did you mean"),
        (Spec.parse("gptq:w4g64").by("llm-compressor"), r"llm-compressor makes compressed-tensors"),
        (Spec.parse("compressed-tensors:W8A8").by("auto-round"), r"auto-round makes gptq and awq"),
        (_spec("FP8_DYNAMIC", algorithm="gptq"), r"gptq is for integers; FP8_DYNAMIC takes rtn"),
        (_spec("W4A16", algorithm="best-scale"), r"algorithm: Input should be 'gptq', 'awq' or"),
        (_spec("W4A16", group_size=48), r"group_size: Input should be 32, 64, 128 or -1"),
        (_spec("W8A8", group_size=64), r"group_size is for W4A16, W4A16_ASYM and W8A16"),
        (_spec("W4A16", smoothing=True), r"smoothing is for W8A8"),
        (_spec("W8A8", smoothing=False, smoothing_strength=0.5), r"strength is for W8A8 with smoo"),
        (_spec("W8A8", smoothing_strength=2), r"smoothing_strength: Input should be less than or"),
        (_spec("W4A16_ASYM", dampening_frac=0.1), r"dampening_frac is for gptq"),
        (_spec("W4A16", duo_scaling=True), r"duo_scaling is for awq"),
        (_spec("W4A16", iters=5), r"unknown option 'iters'; llm-compressor takes algorithm, group"),
    ],
    ids=str,
)  # fmt: skip
def test_what_it_does_not_make_is_refused_by_plan(
    spec: Spec, message: str, tiny_llama: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(Checkpoint.open(tiny_llama), spec)


def _written(
    source: Path, calibration: Calibration, tmp: Path, monkeypatch: pytest.MonkeyPatch,
    *, scheme: str = "W8A8", native: str = "W8A8", change: Any = None,
) -> Variant:  # fmt: skip
    """The variant whose package writes what quantkit makes by itself, after a ``change``."""
    made = convert(
        Checkpoint.open(source),
        Spec.of_entry({"spec": f"compressed-tensors:{native}", "algorithm": "rtn"}),
        None,
        tmp / "native",
    ).path
    tensors = load_file(made / "model.safetensors")
    config = json.loads((made / "config.json").read_text())
    if change:
        change(tensors, config["quantization_config"]["config_groups"]["group_0"])
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    (made / "config.json").write_text(json.dumps(config))
    script = tmp / "script.py"
    script.write_text(
        "import json, shutil\n"
        "def make(job):\n"
        f"    shutil.copytree({str(made)!r}, job['output'])\n"
        "    saw = {k: v for k, v in job.items() if k in ('scheme', 'bits', 'ignore', 'options')}\n"
        "    saw['ids'] = json.load(open(job['token_ids']))\n"
        "    return {'directory': job['output'], 'calibration': 'so', 'options': {'saw': saw}}\n"
    )
    monkeypatch.setattr(LLMCompressor, "script", str(script))
    return convert(Checkpoint.open(source), _spec(scheme), calibration, tmp / "out")


def test_a_variant_like_any_other(
    tiny_llama: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = _written(tiny_llama, calibration, tmp_path, monkeypatch)
    assert variant.id == "ct-W8A8-llm-compressor"
    assert verify(variant) == []
    manifest = variant.manifest
    assert manifest is not None
    saw = manifest.spec["saw"]
    assert saw["ids"] == calibration.ids.tolist()
    assert (saw["scheme"], saw["bits"]) == ("W8A8", 8)
    assert saw["ignore"] == ["model.embed_tokens", "lm_head"]
    assert saw["options"]["smoothing_strength"] == 0.8
    assert manifest.tools["llm-compressor"] == "0.0.1"
    assert manifest.calibration == calibration.record
    assert len(manifest.notes) == 1  # that engines round activations


def test_what_needs_no_text_is_given_none(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: Calibration
) -> None:
    variant = _written(
        tiny_llama, calibration, tmp_path, monkeypatch, scheme="NVFP4A16", native="NVFP4A16"
    )
    manifest = variant.manifest
    assert manifest is not None
    assert manifest.spec["saw"]["ids"] == []
    assert manifest.calibration is None


def test_linears_that_fit_no_kernel_are_ignored(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As are those that engines run as one with them."""
    source = make_checkpoint(tmp_path / "source", intermediate_size=264)
    variant = _written(source, calibration, tmp_path, monkeypatch)
    assert variant.manifest is not None
    ignored = variant.manifest.spec["saw"]["ignore"]
    assert {name for name in ignored if "layers.1" in name} == {
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    }


def _nan(tensors: dict[str, torch.Tensor], _: Any) -> None:
    tensors[f"{LINEAR}.weight_scale"][0] = torch.nan


def _left(tensors: dict[str, torch.Tensor], _: Any) -> None:
    del tensors[f"{LINEAR}.weight_scale"]
    tensors[f"{LINEAR}.weight"] = tensors[f"{LINEAR}.weight"].bfloat16()


def _lost(tensors: dict[str, torch.Tensor], _: Any) -> None:
    del tensors["model.norm.weight"]


def _weights_only(_: Any, group: dict[str, Any]) -> None:
    group["input_activations"] = None


@pytest.mark.parametrize(
    ("native", "change", "message"),
    [
        ("W8A8", _nan, rf"scales of {LINEAR} are not finite"),
        ("W8A8", _left, rf"{LINEAR}\.weight is to be I8 \[512, 256\], and .* wrote BF16"),
        ("W8A8", _lost, r"model\.norm\.weight is to be BF16 \[256\], .* wrote nothing"),
        ("W8A8", _weights_only, r"wrote another scheme than W8A8"),
        ("FP8_DYNAMIC", None, r"wrote another scheme than W8A8"),
    ],
    ids=["scale", "unquantized", "lost", "activations", "weights"],
)
def test_what_it_wrote_is_not_trusted(
    native: str, change: Any, message: str, tiny_llama: Path, calibration: Calibration,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(ConversionError, match=message):
        _written(tiny_llama, calibration, tmp_path, monkeypatch, native=native, change=change)
    assert list((tmp_path / "out").iterdir()) == []
