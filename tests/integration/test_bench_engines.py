"""Benches of real engines, and what is left when one of them or the bench itself is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from pydantic import TypeAdapter

from quantkit.benchmark import bench, engines_of
from quantkit.benchmark.generator import Client
from quantkit.benchmark.loads import Times, Workload
from quantkit.benchmark.measured import BenchResult, Incomplete
from quantkit.benchmark.options import BenchOptions
from quantkit.benchmark.section import BenchSection
from quantkit.benchmark.server import Servers
from quantkit.benchmark.session import Keep
from quantkit.engines.base import Engine
from quantkit.engines.llamacpp import LlamaCpp
from quantkit.engines.vllm import VLLM
from quantkit.errors import EngineError, RecipeError
from quantkit.ledger.load import MemoryBandwidth, Slo
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Model, Variant
from quantkit.producers.convert import convert
from tests.integration.servers import tree, wait_until_gone
from tests.models import make_checkpoint

PROMPT_TOKENS, OUTPUT_TOKENS, SECONDS = 64, 24, 2.5
WORKLOAD = Workload.synthetic(PROMPT_TOKENS, OUTPUT_TOKENS)
MACHINE = MemoryBandwidth(
    read_bytes_per_s=1e10, copy_bytes_per_s=1e10, triad_bytes_per_s=1e10, threads=2, array_bytes=1
)


def _bench(
    model: Model, engine: Engine, options: BenchOptions, work: Path, keep: Keep | None = None
) -> BenchResult:
    with Client(work / "guidellm") as client, Servers(model, options, work, client) as servers:
        return bench(servers, engine, MACHINE, keep)


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """30 million weights: some milliseconds a token, so that the client is not what is timed."""
    directory = tmp_path_factory.mktemp("bench")
    source = make_checkpoint(
        directory / "model",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return convert(Checkpoint.open(source), Spec("gguf", "Q8_0"), None, directory / "out")


def test_bench_on_llama_server(variant: Variant, tmp_path: Path) -> None:
    options = BenchOptions(
        WORKLOAD, (1, 3), slo=None, times=Times(1.0, SECONDS), repetitions=2, price_per_hour=3.6
    )
    result = _bench(variant, LlamaCpp(), options, tmp_path)
    assert [found.concurrency for found in result.benches] == [1, 3]
    assert result.sample is not None
    assert result.sample.completion
    weights = variant.weights.stat().st_size
    for found in result.benches:
        assert str(found.engine).startswith("llamacpp 0.")
        assert found.errors == 0
        assert len(found.repetitions) == 2
        spread = found.throughput_spread
        assert spread.low <= found.output_tokens_per_s <= spread.high
        # The server itself says that its cache of prompts was of no use.
        assert [one.cached_tokens for one in found.repetitions] == [0, 0]
        # Tokens as they come against whole requests: up to one request a stream apart.
        for one in found.repetitions:
            by_requests = one.request_per_s * OUTPUT_TOKENS
            slack = found.concurrency * OUTPUT_TOKENS / one.seconds
            assert one.output_tokens_per_s == pytest.approx(by_requests, abs=1.2 * slack)
        # Little's law: requests at a time = rate x seconds of each. Generous: few requests.
        each = (found.ttft_ms.p50 + found.itl_ms.p50 * (OUTPUT_TOKENS - 1)) / 1e3
        assert found.request_per_s * each == pytest.approx(found.concurrency, rel=0.6)
        assert 0 < (found.load_seconds or 0) < found.startup_seconds < 60
        assert weights < found.peak_rss_bytes < weights + (500 << 20)
        assert found.cost_per_million_tokens == pytest.approx(1e3 / found.output_tokens_per_s)
        assert found.bandwidth is not None
        assert 0.9 * weights < found.bandwidth.step_bytes < weights
        share = found.bandwidth.bytes_per_token * found.output_tokens_per_s / 1e10
        assert found.bandwidth.share == pytest.approx(share)
        assert found.protocol["load_generator"] == "guidellm 0.8.1"
        assert (found.protocol["slots"], found.protocol["context"]) == (3, 192)
        assert "PORT" in found.protocol["server"]
    assert not [p for p in psutil.process_iter() if p.ppid() == os.getpid() and "llama" in p.name()]


def test_prompts_that_repeat_come_from_the_cache_where_it_is_asked_for(
    variant: Variant, tmp_path: Path
) -> None:
    """The other side of the zeros above: a cache that is on is seen."""
    own = Workload(None, 4, 64, ("the quick brown fox jumps over the lazy dog " * 5,))
    options = BenchOptions(own, (1,), times=Times(0.5, 1.5), repetitions=1, prefix_cache=True)
    (found,) = _bench(variant, LlamaCpp(), options, tmp_path).benches
    assert (found.repetitions[0].cached_tokens or 0) > 0


def test_bench_on_vllm(tmp_path: Path) -> None:
    """A closed loop and an open one, with an objective that every request meets."""
    source = Checkpoint.open(make_checkpoint(tmp_path / "model"))
    (engine,) = engines_of(["llamacpp", "vllm"], source)
    assert isinstance(engine, VLLM)
    slo = Slo(ttft_ms=20_000, itl_ms=2_000)
    options = BenchOptions(
        Workload.synthetic(32, 4), (2,), (0.8,), "constant", times=Times(1.0, 3.0), repetitions=1
    )
    result = _bench(source, engine, options, tmp_path / "work")
    (closed,), (rate,) = result.benches, result.rates
    assert closed.repetitions[0].cached_tokens == 0
    assert closed.load_seconds is not None  # vLLM says it to 10 ms: 0.0 for a model this small
    assert closed.bandwidth is not None
    assert closed.bandwidth.step_bytes == 2 * source.parameters  # tied: the output layer is read
    assert rate.attained is None
    assert rate.rate_per_s == 0.8
    assert 1 <= rate.requests <= 4
    assert slo.met_by(rate.ttft_ms.p99, rate.itl_ms.p99)


def test_a_level_that_is_too_slow_is_an_error(variant: Variant, tmp_path: Path) -> None:
    """Not even in a window sixteen times as long, which is 0.3 s for 1900 tokens."""
    times = Times(0.0, 0.02)
    options = BenchOptions(Workload.synthetic(64, 1900), (1,), times=times, repetitions=1)
    with pytest.raises(EngineError, match="concurrency 1: too slow: no request was completed"):
        _bench(variant, LlamaCpp(), options, tmp_path)


def test_requests_that_the_model_has_no_room_for_are_refused(
    variant: Variant, tmp_path: Path
) -> None:
    options = BenchOptions(Workload.synthetic(64, 1985))
    with pytest.raises(RecipeError, match="64 tokens and an answer of 1985 are more than the 2048"):
        _bench(variant, LlamaCpp(), options, tmp_path)


def test_an_engine_that_is_killed_leaves_what_was_measured(
    variant: Variant, tmp_path: Path
) -> None:
    kept: list[int] = []

    def kill_after_two(kind: str, *, key: object, make: object, shape: type) -> object:
        if len(kept) == 2:
            server = next(p for p in psutil.Process().children(True) if "llama" in p.name())
            threading.Timer(2.0, server.kill).start()
        found = make()  # type: ignore[operator]
        kept.append(1)
        return found

    options = BenchOptions(WORKLOAD, (1, 3), times=Times(0.5, 4.0), repetitions=2)
    with pytest.raises(Incomplete, match="llamacpp ended with exit code 137 under load") as caught:
        _bench(variant, LlamaCpp(), options, tmp_path, keep=kill_after_two)  # type: ignore[arg-type]
    assert [found.concurrency for found in caught.value.result.benches] == [1, 3]
    assert [len(found.repetitions) for found in caught.value.result.benches] == [1, 1]


_STAGE = """
import sys
from pathlib import Path
from quantkit.models.checkpoint import Checkpoint
from quantkit.benchmark.section import BenchSection
from quantkit.runs.directory import open_run
from quantkit.runs.stages import Benching
from quantkit.formats.detect import open_variant
from quantkit.system.progress import to_terminal
to_terminal()
source, variant, out = map(Path, sys.argv[1:4])
section = BenchSection.model_validate_json(sys.argv[4])
with open_run(out) as run:
    with Benching.prepared(section, Checkpoint.open(source), run) as benching:
        with benching.servers(open_variant(variant)) as servers:
            benching.measure(servers)
"""
"""A run's bench of one variant."""


def test_a_run_that_is_killed_goes_on_with_the_next_repetition(
    variant: Variant, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    section = BenchSection(
        concurrency=[1, 2], prompt_tokens=32, output_tokens=8, seconds=1.5, repetitions=2
    )
    places = [str(variant.path.parent.parent / "model"), str(variant.path), str(out)]
    argv = [sys.executable, "-c", _STAGE, *places, section.model_dump_json()]
    results = out / "results"

    def repetitions() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in results.glob("gguf-Q8_0-load-*.json")}

    run = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while len(repetitions()) < 2 and time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.1)
    processes = tree(run.pid)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    wait_until_gone(processes)
    left = repetitions()
    assert 2 <= len(left) < 4
    again = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("gguf-Q8_0-load: done already") == len(left)
    assert "memory-bandwidth: done already" in again.stderr
    assert {path: when for path, when in repetitions().items() if path in left} == left
    (whole,) = results.glob("gguf-Q8_0-bench-*.json")
    found = TypeAdapter(BenchResult).validate_json(whole.read_bytes())
    assert [len(bench.repetitions) for bench in found.benches] == [2, 2]
    assert found.error is None


def test_engines_are_those_that_take_the_model(variant: Variant) -> None:
    assert [engine.name for engine in engines_of(["vllm", "llamacpp"], variant)] == ["llamacpp"]
    assert [engine.name for engine in engines_of([], variant)] == ["llamacpp"]
    assert [engine.name for engine in engines_of(["vllm"], variant)] == ["llamacpp"]
