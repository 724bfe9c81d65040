"""What quantkit knows of vLLM's architectures is what the vLLM in its toolchain says."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit import toolchains
from quantkit.errors import ToolchainError
from tests.integration.vllm_architectures import WRITTEN, ask


def test_as_vllm_says(tmp_path: Path) -> None:
    try:
        toolchain = toolchains.find("vllm")
    except ToolchainError as error:
        pytest.skip(str(error))
    if toolchain.device != "cpu":
        pytest.skip("what has to be installed besides was asked of vLLM for the CPU")
    ask(tmp_path / "asked.json")
    assert (tmp_path / "asked.json").read_text() == WRITTEN.read_text()
