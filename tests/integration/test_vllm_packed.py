"""Checkpoints in others' layouts, made by the package itself, in vLLM: two starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit import toolchains
from quantkit.errors import ToolchainError
from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from tests.integration.servers import assert_agrees
from tests.packed_checkpoints import as_gptq, draw, write
from tests.plain_weights import plain_weights
from tests.vllm_kernels import needs_integer_kernels

pytestmark = needs_integer_kernels

SCRIPT = Path(__file__).with_name("compress.py")


@pytest.fixture(scope="module")
def compressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, packed by compressed-tensors, which vLLM's toolchain brings."""
    try:
        python = toolchains.find("vllm").python
    except ToolchainError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("compressed")
    subprocess.run([python, "-I", SCRIPT, tiny_llama, out], check=True)
    return out


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_weights_unpack_as_the_package_unpacks_them(kind: str, compressed: Path) -> None:
    expected = load_file(compressed / kind / "expected" / "model.safetensors")
    plain = dict(plain_weights(compressed / kind))
    assert len(expected) == 14
    for name, weight in expected.items():
        assert torch.equal(plain[name].to(weight.dtype), weight), name


def test_vllm_computes_what_was_evaluated_of_compressed_tensors(
    compressed: Path, tmp_path: Path
) -> None:
    assert_agrees(open_variant(compressed / "asymmetric"), tmp_path / "log")


def test_vllm_computes_what_was_evaluated_of_auto_rounds_own_format(
    compressed: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    source, parts = Checkpoint.open(tiny_llama), {}
    for name, info in source.tensors.items():
        if name.endswith("_proj.weight"):
            drawn = draw(info.shape, 4, info.shape[1] // 64, symmetric=True)
            parts[name.removesuffix(".weight")] = as_gptq(drawn, 4, stored_less=1, g_idx=False)
    quantization = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "data_type": "int",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "block_name_to_quantize": "model.layers",
    }
    path = write(tiny_llama, tmp_path / "theirs", parts, quantization)
    assert_agrees(open_variant(path), tmp_path / "log")
