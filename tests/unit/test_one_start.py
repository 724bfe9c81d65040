"""Each engine's server is started once for a model, whatever it is asked for."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantkit.benchmark.generator import Client
from quantkit.benchmark.loads import Workload
from quantkit.benchmark.measured import BenchResult
from quantkit.benchmark.options import BenchOptions
from quantkit.benchmark.server import Servers
from quantkit.engines.server import ServeOptions, ServerCommand
from quantkit.engines.vllm import VLLM
from quantkit.engines.vllm.memory import cache_bytes
from quantkit.errors import EngineError
from quantkit.evaluation.perplexity import windows
from quantkit.evaluation.samples import Evaluated, MeasuredText
from quantkit.evaluation.split import window_likelihoods
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.variant import Model, Variant
from quantkit.runs.directory import open_run
from quantkit.runs.recipe import load_recipe
from quantkit.runs.stages import Texts
from quantkit.runs.steps import Work
from tests.fake_vllm import log_probs

OPTIONS = BenchOptions(Workload.synthetic(64, 16))


class Fake(VLLM):
    """vLLM, whose server is another program and counts its starts."""

    def __init__(self, program: str = "tests.fake_vllm") -> None:
        super().__init__()
        self.program = program
        self.started: list[ServeOptions] = []

    def version(self) -> str:
        return "0.0.0"

    def check(self, model: Model) -> None: ...

    def server(self, model: Model, options: ServeOptions) -> ServerCommand:
        self.started.append(options)
        words = (str(options.port), str(options.api_key), str(model.path / "written"))
        return ServerCommand((sys.executable, "-m", self.program, *words))


@pytest.fixture
def servers(tmp_path: Path) -> Servers:
    model = Variant("v", tmp_path, "gptq", "w4g64", None)
    return Servers(model, OPTIONS, tmp_path / "logs", Client(tmp_path / "client"), longest=33)


def test_a_server_answers_for_load_and_text_on_one_start(servers: Servers) -> None:
    """The likelihoods are those of a slow loop over the same model."""
    cut = windows([(7 * n) % 30 for n in range(128)], 32)
    engine = Fake()
    with servers:
        served = servers.on(engine)
        assert served.sample.completion == " Paris"
        found = window_likelihoods(servers.model, engine, cut, servers.on(engine).running)
        assert psutil.pid_exists(served.process.pid)
    assert not psutil.pid_exists(served.process.pid)
    assert [(one.longest, one.context, one.slots) for one in engine.started] == [(33, 192, 4)]
    for ids, mean in zip(cut.ids, found, strict=True):
        scored = range(cut.first + 1, len(ids))
        own = [-log_probs(list(ids[:at]))[ids[at]] for at in scored]
        assert mean == pytest.approx(sum(own) / len(own), abs=1e-5)


def test_a_server_that_does_not_start_is_not_tried_again(servers: Servers) -> None:
    engine = Fake("no_such")
    with servers:
        for _ in range(2):
            with pytest.raises(EngineError, match="before it was ready"):
                servers.on(engine)
    assert len(engine.started) == 1


def test_a_server_that_has_ended_says_so(servers: Servers) -> None:
    engine = Fake()
    with servers:
        served = servers.on(engine)
        psutil.Process(served.process.pid).kill()
        served.process.wait(30)
        with pytest.raises(EngineError, match="ended with exit code 137"):
            servers.on(engine)


def test_a_text_needs_room_for_one_request_more_not_for_many(tiny_llama: Path) -> None:
    """Four slots of 192 tokens are eight blocks of 128: a window of 513 fits, one of 1025 not."""
    source = Checkpoint.open(tiny_llama)
    load = {"port": 1, "context": 192, "slots": 4}
    plain, fits, more = (
        cache_bytes(source, ServeOptions(**load, longest=longest))  # type: ignore[arg-type]
        for longest in (None, 513, 1025)
    )
    assert plain == fits
    assert more * (8 + 1) == plain * (9 + 1)


class Splitting:
    """Which asks the model's server, as for GPTQ on vLLM."""

    longest = 513

    def __init__(self, engine: Fake) -> None:
        self.engine = engine
        self.asked: list[str] = []

    def asks_server(self, _: Model) -> bool:
        return True

    def split(self, model: Variant, _: Evaluated, servers: Servers) -> None:
        servers.on(self.engine)
        self.asked.append(model.id)


class Benching:
    bandwidth = None

    def __init__(self, engine: Fake, work: Path) -> None:
        self.engine, self.work = engine, work

    def servers(self, model: Model, longest: int | None) -> Servers:
        return Servers(model, OPTIONS, self.work, Client(self.work / "client"), longest)

    def measure(self, servers: Servers) -> BenchResult:
        servers.on(self.engine)
        return BenchResult()


def test_a_run_starts_one_server_a_variant(tiny_llama: Path, tmp_path: Path) -> None:
    """The steps of bench and split together, twice: the second split finds nothing left to do."""
    recipe = load_recipe("quickstart", [f"source={tiny_llama}", "convert=[gptq:w4g64, awq:w4g64]"])
    engine = Fake()
    splitting: Any = Splitting(engine)
    with open_run(tmp_path / "run") as directory, ExitStack() as stack:
        source, texts = Checkpoint.open(tiny_llama), Texts(None, {}, None)
        work = Work(recipe, source, [], texts, directory, stack, force=False)
        work.benching = Benching(engine, tmp_path / "logs")  # type: ignore[assignment]
        work._splitting = splitting
        for row in work.rows[1:]:
            row.model = Variant(row.id, tmp_path, "gptq", "w4g64", None)
            row.evaluated = Evaluated(texts={"a": MeasuredText(metrics={}, windows={"ppl": [1.0]})})
        for step in work.steps():
            if step.stage in ("bench", "split") and step.row != "reference":
                step.work()
    assert [row.failed for row in work.rows] == [None] * 3
    assert splitting.asked == ["gptq-w4g64", "awq-w4g64"]
    assert [one.longest for one in engine.started] == [513, 513]
    assert all({"bench", "split"} <= set(row.seconds) for row in work.rows[1:])
