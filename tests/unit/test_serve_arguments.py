"""What a user passes through reaches the engine's own command line."""

from __future__ import annotations

import asyncio
import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit import toolchains
from quantkit.cli.main import cli
from quantkit.engines.process import free_port
from quantkit.engines.vllm import VLLM
from quantkit.errors import EngineError
from quantkit.gateway.config import load_config
from quantkit.gateway.engine_process import EngineProcess
from quantkit.models.variant import Variant
from quantkit.toolchains import Toolchain

SEVERAL_MACHINES = {
    "tensor_parallel_size": 8,
    "pipeline_parallel_size": 2,
    "distributed_executor_backend": "ray",
}
ON_THE_COMMAND_LINE = [
    "--tensor-parallel-size", "8", "--pipeline-parallel-size", "2",
    "--distributed-executor-backend", "ray",
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128,
            "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64},
        })
    )  # fmt: skip
    (path / "model.safetensors").touch()
    return path


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a program that stands in for vLLM's interpreter writes its arguments, then fails."""
    words = tmp_path / "words"
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nfor word in "$@"; do echo "$word"; done > {shlex.quote(str(words))}\nexit 3\n'
    )
    program.chmod(0o755)
    toolchain = Toolchain(
        name="vllm", version="0", device="cuda", directory=tmp_path, pip=(), packages={}
    )
    monkeypatch.setattr(toolchains, "find", lambda _: toolchain)
    return words


def test_behind_a_gateway(model: Path, said: Path, tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    engine = json.dumps({"name": "vllm", **SEVERAL_MACHINES})
    file.write_text(f"backends:\n  huge: {{path: {model}, engine: {engine}, slots: 128}}\n")
    section = load_config(file, {}).backends["huge"]
    variant = Variant("huge", model, "awq", "w4g64", None)
    assert section.engine is not None
    vllm = VLLM(section.engine.options)
    with pytest.raises(EngineError, match="exit code 3 before it was ready"):
        asyncio.run(EngineProcess.launch("huge", variant, vllm, section, tmp_path / "log"))
    words = said.read_text().splitlines()
    assert words[-6:] == ON_THE_COMMAND_LINE
    assert words[words.index("--max-num-seqs") + 1] == "128"


def test_one_model_that_cannot_be_loaded(
    model: Path, said: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is told to pass on reached it, and how it ended is the last line."""
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path))
    port = free_port()
    given = [f"{name.replace('_', '-')}={value}" for name, value in SEVERAL_MACHINES.items()]
    options = [word for pair in given for word in ("--engine-arg", pair)]
    done = CliRunner().invoke(
        cli, ["serve", str(model), "--engine", "vllm", "--port", str(port), *options]
    )
    assert str(done.exception) == (
        "vllm ended with exit code 3 before it was ready: it said nothing; see "
        f"{tmp_path}/logs/serve-{port}/model.log"
    )
    assert said.read_text().splitlines()[-6:] == ON_THE_COMMAND_LINE
