"""Our checkpoints in other packages: they compute with the numbers that we unpack.

llama.cpp's converter is there where the GGUF tests are; AutoAWQ and AutoGPTQ only where somebody
has installed their toolchains, which takes minutes: CI has not.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit import toolchains
from quantkit.data.calibration import calibrate
from quantkit.data.texts import load_text
from quantkit.errors import ToolchainError
from quantkit.formats.gguf.unpacked import UnpackedGGUF
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert
from tests.integration.gguf_oracle import oracle
from tests.plain_weights import plain_weights

SCRIPT = Path(__file__).with_name("elsewhere.py")


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variant]:
    source, out = Checkpoint.open(tiny_llama), tmp_path_factory.mktemp("variants")
    windows = calibrate(
        load_text("pydoc:calibration"), source.tokenizer, samples=4, sequence_length=64, seed=0
    )
    return {
        spec: convert(source, Spec.parse(spec), windows, out)
        for spec in ("gptq:w4g64", "awq:w4g64")
    }


def elsewhere(package: str, variant: Variant, out: Path) -> dict[str, torch.Tensor]:
    try:
        python = toolchains.find(package).python
    except ToolchainError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [python, "-I", SCRIPT, package, variant.path, out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


def test_autoawq_computes_with_the_same_weights(made: dict[str, Variant], tmp_path: Path) -> None:
    variant = made["awq:w4g64"]
    theirs = elsewhere("autoawq", variant, tmp_path / "weights.safetensors")
    ours = dict(plain_weights(variant.path))
    assert len(theirs) == 14
    for name, weight in theirs.items():
        # It multiplies in half precision.
        assert torch.equal(ours[name].half().float(), weight), name


def test_auto_gptq_computes_with_the_same_weights(made: dict[str, Variant], tmp_path: Path) -> None:
    variant = made["gptq:w4g64"]
    theirs = elsewhere("auto-gptq", variant, tmp_path / "weights.safetensors")
    ours = dict(plain_weights(variant.path))
    assert len(theirs) == 14
    for name, weight in theirs.items():
        assert torch.equal(ours[name].half().float(), weight), name


def test_llama_cpps_converter_reads_the_same_weights(
    made: dict[str, Variant], llama_cpp_source: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    variant = made["gptq:w4g64"]
    oracle(llama_cpp_source, [(variant.path, "F32", tmp_path / "m.gguf")], tokenizer=False)
    theirs = UnpackedGGUF.of(Checkpoint.open(tiny_llama), tmp_path / "m.gguf")
    ours = dict(plain_weights(variant.path))
    assert theirs.tensors.keys() == ours.keys()
    for name, weight in ours.items():
        assert torch.equal(theirs.read(name).float(), weight.float()), name
