"""The packages as producers, where somebody has installed their toolchains: CI has not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit import toolchains
from quantkit.calibration import calibrate
from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.engines.transformers.weights import load
from quantkit.errors import ToolchainError
from quantkit.producers.staging import stage_source
from quantkit.spec import Spec
from quantkit.texts import load_text
from quantkit.toolchains import Toolchain
from tests.models import make_checkpoint

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
    manifest = variant.manifest
    assert manifest is not None
    assert manifest.tools[producer] == toolchain.version
    assert manifest.spec["calibration_given"].startswith("8 x 32 token ids")
    assert manifest.notes == []
    ids = torch.tensor(source.tokenizer("The value of the expression").input_ids)[None]
    with torch.no_grad():
        expected = load(source, torch.float32)(ids).logits.log_softmax(-1)
        found = load(variant, torch.float32)(ids).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 1e-5 < divergence < 0.05
