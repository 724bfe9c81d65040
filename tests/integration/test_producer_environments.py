"""The packages as producers, where somebody has installed their toolchains: CI has not."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit import toolchains
from quantkit.data.calibration import calibrate
from quantkit.data.texts import load_text
from quantkit.engines.transformers.weights import load
from quantkit.errors import ToolchainError
from quantkit.formats.detect import open_variant
from quantkit.models import demo
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert, plan
from quantkit.producers.staging import stage_source
from quantkit.toolchains import Toolchain
from tests.models import make_checkpoint
from tests.plain_weights import plain_weights

HERE = Path(__file__).parent
LOGITS = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(torch.arange(3, 131)[None]).logits[0]}, sys.argv[2])
"""


def installed(name: str) -> Toolchain:
    try:
        return toolchains.find(name)
    except ToolchainError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    ],
)
def test_transformers_4_computes_what_transformers_5_does(
    rope: dict[str, object], tmp_path: Path
) -> None:
    """The rotary base has moved in config.json: unknown to 4, which would take another one."""
    python = installed("autoawq").python
    source = Checkpoint.open(make_checkpoint(tmp_path / "source", rope_parameters=rope))
    assert source.config["rope_parameters"]["rope_theta"] == 500.0
    stage_source(source, tmp_path / "staged", transformers_4=True)
    out = tmp_path / "logits.safetensors"
    subprocess.run([python, "-I", "-c", LOGITS, tmp_path / "staged", out], check=True)
    with torch.no_grad():
        expected = load(source, torch.float32)(torch.arange(3, 131)[None]).logits[0]
    torch.testing.assert_close(load_file(out)["logits"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "producer", "options"),
    [
        ("gptq:w4g64", "auto-round", {"iters": 2}),
        ("awq:w4g64", "auto-round", {"iters": 0}),
        ("awq:w4g64", "autoawq", {}),
    ],
)
def test_a_package_makes_what_is_near_its_source(
    spec: str, producer: str, options: dict[str, int], tiny_llama: Path, tmp_path: Path
) -> None:
    toolchain = installed(producer)
    source = Checkpoint.open(tiny_llama)
    windows = calibrate(
        load_text("pydoc:calibration"), source.tokenizer, samples=8, sequence_length=32, seed=0
    )
    variant = convert(source, Spec.parse(spec).by(producer).having(options), windows, tmp_path)
    assert divergence(source, variant) < 0.05
    manifest = variant.manifest
    assert manifest is not None
    assert manifest.tools[producer] == toolchain.version
    assert manifest.spec["calibration_given"].startswith("8 x 32 token ids")
    assert manifest.notes == []


@pytest.mark.parametrize(
    ("scheme", "options"), [("W8A8", {}), ("W4A16", {"group_size": 64}), ("FP8_DYNAMIC", {})]
)
def test_llm_compressor_makes_what_is_near_its_source(
    scheme: str, options: dict[str, int], tiny_llama: Path, tmp_path: Path
) -> None:
    """And its own library unpacks the file to the bits that quantkit does."""
    toolchain = installed("llm-compressor")
    source = Checkpoint.open(tiny_llama)
    windows = calibrate(
        load_text("pydoc:calibration"), source.tokenizer, samples=8, sequence_length=32, seed=0
    )
    spec = Spec.parse(f"compressed-tensors:{scheme}").by("llm-compressor").having(options)
    variant = convert(source, spec, windows, tmp_path)
    assert divergence(source, variant) < 0.1
    manifest = variant.manifest
    assert manifest is not None
    assert manifest.tools["llm-compressor"] == toolchain.version
    calibrated = scheme != "FP8_DYNAMIC"
    given = "8 x 32 token ids, one by one" if calibrated else "nothing"
    assert manifest.spec["calibration_given"] == given
    assert (manifest.calibration is not None) == calibrated
    written = sum(info.bytes for info in Checkpoint.open(variant.path).tensors.values())
    assert written == plan(source, spec).bytes
    out = tmp_path / "weights.safetensors"
    script = HERE / "decompress.py"
    subprocess.run([toolchain.python, "-I", script, variant.path, out], check=True)
    theirs, ours = load_file(out), dict(plain_weights(variant.path))
    assert len(theirs) == 14
    for name, weight in theirs.items():
        assert torch.equal(ours[name].to(weight.dtype), weight), name


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC", "MXFP4", "NVFP4A16"])
def test_rounding_to_nearest_is_llm_compressors_to_the_bit(
    scheme: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Where weights are stored in float32: it computes in their dtype."""
    installed("llm-compressor")
    shutil.copytree(tiny_llama, tmp_path / "wide")
    file = tmp_path / "wide" / "model.safetensors"
    save_file({name: weight.float() for name, weight in load_file(file).items()}, file)
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    source = Checkpoint.open(tmp_path / "wide")
    spec = Spec.parse(f"compressed-tensors:{scheme}").having({"algorithm": "rtn"})
    ours, theirs = (
        load_file(convert(source, one, None, tmp_path).path / "model.safetensors")
        for one in (spec, spec.by("llm-compressor"))
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype, name
        raw = [one.contiguous().view(torch.uint8) for one in (ours[name], tensor)]
        assert torch.equal(*raw), name


def divergence(source: Checkpoint, variant: Variant) -> float:
    """Mean KL divergence over a few tokens; more than nothing."""
    ids = torch.tensor(source.tokenizer("The value of the expression").input_ids)[None]
    with torch.no_grad():
        expected = load(source, torch.float32)(ids).logits.log_softmax(-1)
        found = load(variant, torch.float32)(ids).logits.log_softmax(-1)
    measured = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert measured > 1e-5
    return measured


def test_autoawq_on_the_cpu_keeps_the_weights_that_it_scales(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Its search forgets the weights as they were; seen where channels are of different sizes."""
    installed("autoawq")
    source = Checkpoint.open(tiny_llama)
    weights = {name: source.read(name).float() for name in source.tensors}
    changed = demo.rescale(weights, source.config, seed=1)
    stretched = tmp_path / "stretched"
    shutil.copytree(tiny_llama, stretched)
    save_file(
        {name: weight.half() for name, weight in changed.items()}, stretched / "model.safetensors"
    )
    source = Checkpoint.open(stretched)
    windows = calibrate(
        load_text("pydoc:calibration"), source.tokenizer, samples=8, sequence_length=32, seed=0
    )
    variant = convert(source, Spec.parse("awq:w4g64").by("autoawq"), windows, tmp_path / "out")
    found = dict(plain_weights(variant.path))
    layer = "model.layers.1."
    norm = layer + "input_layernorm.weight"
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"{layer}self_attn.{name}.weight"
        expected = source.read(key).float() * source.read(norm).float()
        assert (found[key] * found[norm] - expected).norm() < 0.2 * expected.norm(), name


def test_auto_gptq_with_its_activation_order(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for CUDA, and computes without; its own module is the oracle for ``g_idx``."""
    toolchain = installed("auto-gptq")
    monkeypatch.setattr("quantkit.producers.job.LAUNCHER", HERE / "auto_gptq_on_cpu.py")
    monkeypatch.setattr("quantkit.producers.package.gpu", lambda: "none, but who knows")
    source = Checkpoint.open(tiny_llama)
    windows = calibrate(
        load_text("pydoc:calibration"), source.tokenizer, samples=16, sequence_length=64, seed=0
    )
    spec = Spec.parse("gptq:w4g64").by("auto-gptq").having({"desc_act": True})
    variant = convert(source, spec, windows, tmp_path / "out")
    assert divergence(source, variant) < 0.05
    g_idx = load_file(variant.path / "model.safetensors")["model.layers.0.mlp.down_proj.g_idx"]
    assert g_idx.tolist() != sorted(g_idx.tolist())
    out = tmp_path / "weights.safetensors"
    subprocess.run(
        [toolchain.python, "-I", HERE / "elsewhere.py", "auto-gptq", variant.path, out], check=True
    )
    ours = dict(plain_weights(variant.path))
    theirs = load_file(out)
    assert len(theirs) == 14
    for name, weight in theirs.items():
        assert torch.equal(ours[name].half().float(), weight), name


def test_auto_rounds_own_formats(tiny_llama: Path, tmp_path: Path) -> None:
    """Its own modules compute with what we unpack; two packings of one rounding are the same."""
    python = installed("auto-round").python
    script = HERE / "auto_round_formats.py"
    subprocess.run([python, "-I", script, tiny_llama, tmp_path], check=True, capture_output=True)
    plain, source = {}, Checkpoint.open(tiny_llama)
    for kind, format_ in (("auto_gptq", "gptq"), ("own", "gptq"), ("auto_awq", "awq")):
        variant = open_variant(tmp_path / kind)
        assert variant.format == format_
        plain[kind] = dict(plain_weights(variant.path))
        assert plain[kind].keys() == source.tensors.keys()
    left, eight = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    for kind in ("auto_gptq", "own"):
        theirs = load_file(tmp_path / f"{kind}.safetensors")
        assert len(theirs) == 13
        for name, weight in theirs.items():
            assert torch.equal(plain[kind][name].half().float(), weight), (kind, name)
        weight = source.read(eight).float()
        assert (plain[kind][eight] - weight).norm() < 0.01 * weight.norm()
    for name in plain["own"].keys() - {eight}:
        assert torch.equal(plain["own"][name], plain["auto_awq"][name]), name
    assert torch.equal(plain["own"][left], source.read(left))
