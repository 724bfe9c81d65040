"""vLLM serves the source and our GPTQ and AWQ: three starts of half a minute each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quantkit import toolchains
from quantkit.data.calibration import calibrate
from quantkit.data.texts import load_text
from quantkit.engines import serving_engine
from quantkit.errors import ToolchainError
from quantkit.formats.merged import open_merged
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers import merge
from quantkit.producers.convert import convert
from tests.adapters import make_adapter, merged_by_peft
from tests.integration.servers import (
    KEY,
    Running,
    assert_agrees,
    running,
    tree,
    wait_until_gone,
)
from tests.models import make_checkpoint
from tests.vllm_kernels import needs_integer_kernels


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    try:
        toolchains.find("vllm")
    except ToolchainError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The demo source in bf16."""
    demo = Checkpoint.open("demo:smollm2-135m")
    assert serving_engine(demo).name == "vllm"
    with running(demo, tmp_path_factory.mktemp("logs") / "vllm.log") as found:
        yield found
        family = tree(found.process.supervisor.pid)
        assert len(family) >= 4  # supervisor, API, engine core, worker
    wait_until_gone(family, 0.1)


def test_continues_sensibly(server: Running) -> None:
    answer = server.client().completions.create(
        model="m", prompt="The capital of France is", max_tokens=24, temperature=0
    )
    assert "Paris" in answer.choices[0].text


def test_demands_its_key_and_does_not_show_it(server: Running) -> None:
    """On every route, also on those where vLLM by itself does not."""
    with pytest.raises(openai.AuthenticationError):
        server.client("another").completions.create(model="m", prompt="x", max_tokens=1)
    body = {"model": "m", "prompt": "x", "max_tokens": 1}
    for path in ("/invocations", "/tokenize", "/v1/completions", "/inference/v1/generate"):
        assert httpx.post(f"{server.url}{path}", json=body).status_code == 401
    for path in ("/metrics", "/version", "/docs", "/load"):
        assert httpx.get(f"{server.url}{path}").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200
    right = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(f"{server.url}/invocations", json=body, headers=right).status_code == 200
    for process in tree(server.process.supervisor.pid):
        assert KEY not in " ".join(process.cmdline())


def test_no_process_above_4_gib(server: Running) -> None:
    for process in tree(server.process.supervisor.pid):
        assert process.memory_info().rss < 4 << 30


MIXED = {
    "spec": "gptq:w4g64",
    "skip": [r"layers\.0\.self_attn\.[qkv]_proj", r"layers\.1\.mlp\.down_proj"],
    "overrides": {r"layers\.1\.mlp\.(gate|up)_proj": "w4g32"},
}
MIXED_COMPRESSED = {
    "spec": "compressed-tensors:W4A16",
    "group_size": 64,
    "skip": [r"layers\.0\.self_attn\.o_proj"],
    "overrides": {r"layers\.1\.self_attn\.[qkv]_proj": "W8A8", "down_proj": "W8A8"},
}


@needs_integer_kernels
@pytest.mark.parametrize(
    ("family", "entry"),
    [
        ("llama", MIXED),
        ("qwen3", {"spec": "awq:w4g64", "skip": [r"layers\.0\.mlp\.(gate|up)_proj"]}),
        ("qwen3", {"spec": "compressed-tensors:W4A16_ASYM", "algorithm": "awq"}),
        ("llama", {"spec": "compressed-tensors:W8A8", "skip": ["down_proj"]}),
        ("qwen2", {"spec": "compressed-tensors:FP8_DYNAMIC"}),
        ("llama", MIXED_COMPRESSED),
    ],
    ids=["gptq", "awq", "w4a16-asym", "w8a8", "fp8", "w4a16-and-w8a8"],
)
def test_computes_what_was_evaluated(family: str, entry: dict[str, Any], tmp_path: Path) -> None:
    """vLLM's kernels on our packing, some linears left as they are or in smaller groups."""
    source = Checkpoint.open(make_checkpoint(tmp_path / "source", family=family))
    windows = calibrate(
        load_text("pydoc:calibration"), source.tokenizer, samples=8, sequence_length=64, seed=0
    )
    variant = convert(source, Spec.of_entry(entry), windows, tmp_path)
    # Of 8-bit floats every eighth of a power of two is one: bfloat16 decides on which are taken.
    floats = entry["spec"].endswith("FP8_DYNAMIC")
    assert_agrees(variant, tmp_path / "log", tolerance=0.4 if floats else 0.15)


def test_serves_a_source_with_its_adapter(tmp_path: Path) -> None:
    """Against the checkpoint that PEFT makes of both; the base alone is far from it."""
    base = make_checkpoint(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", lora_alpha=64)
    source = merge.kept(open_merged(base, adapter), tmp_path / "run", force=False)
    theirs = Checkpoint.open(merged_by_peft(base, adapter, tmp_path / "theirs"))
    assert_agrees(source, tmp_path / "log", theirs)
    with pytest.raises(AssertionError):
        assert_agrees(Checkpoint.open(base), tmp_path / "log-of-base", theirs)
