"""What is measured when, and what is left when something fails: without engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from quantkit.benchmark.closed_loop import TooSlow
from quantkit.benchmark.generator import Client, LoadGenerator
from quantkit.benchmark.guidellm import Target, scenario
from quantkit.benchmark.loads import Closed, Load, Open, Times, Workload
from quantkit.benchmark.options import BenchOptions
from quantkit.benchmark.results import changes
from quantkit.benchmark.section import BenchSection
from quantkit.benchmark.session import Session
from quantkit.cli.load_section import section
from quantkit.errors import EngineError, RecipeError
from quantkit.ledger.load import Percentiles, Reading, Slo
from quantkit.models.variant import Variant

TIMES = Percentiles(p50=100, p95=100, p99=100)
WORKLOAD = Workload.synthetic(64, 16)


@dataclass
class Generator:
    """Stands in for GuideLLM: each load gives what ``speed`` says, or fails."""

    speed: Callable[[Load], float] = lambda _: 20.0
    fails: Callable[[Load, int], str | None] = lambda *_: None
    asked: list[Load] = field(default_factory=list)

    def measure(self, load: Load, times: Times) -> Reading:
        error = self.fails(load, len(self.asked))
        self.asked.append(load)
        if error:
            raise EngineError(error)
        attained = None
        if isinstance(load, Open):
            attained = 1.0 if load.rate_per_s <= 3.0 else 0.0
        return Reading(
            seconds=times.window,
            output_tokens_per_s=self.speed(load),
            request_per_s=2.0,
            ttft_ms=TIMES,
            itl_ms=TIMES,
            requests=20,
            prompt_tokens=64,
            attained=attained,
        )


@dataclass
class Server:
    exit_code: int | None = None


def session(generator: Any, options: BenchOptions, keep: Any = None, server: Any = None) -> Session:
    return Session(generator, server or Server(), options, {"engine": "e 1"}, keep)


def options(**changed: Any) -> BenchOptions:
    return BenchOptions(WORKLOAD, **{"concurrency": (1, 4), "times": Times(1, 5), **changed})


def test_repetitions_go_round_all_loads() -> None:
    """So that what slows the machine for a while falls on every load."""
    generator = Generator()
    made = session(generator, options(rates=(0.5,)))
    made.measure_all()
    once = [Closed(1), Closed(4), Open(0.5, "poisson")]
    assert generator.asked == once * 3
    assert {load: len(found) for load, found in made.readings.items()} == dict.fromkeys(once, 3)
    assert made.error is None


def test_an_automatic_sweep_repeats_the_levels_that_it_found() -> None:
    generator = Generator(lambda load: 10.0 * min(load.concurrency, 4))  # type: ignore[union-attr]
    made = session(generator, options(concurrency=None, repetitions=2))
    made.measure_all()
    levels = [Closed(n) for n in (1, 2, 4, 8, 16)]
    assert generator.asked == levels * 2


def test_a_window_is_long_enough_for_requests_that_take_long() -> None:
    """At 1 a request takes 100 + 15 x 100 ms = 1.6 s, so with 8 at a time up to 12.8 s."""
    windows: dict[Load, Times] = {}

    class Noting(Generator):
        def measure(self, load: Load, times: Times) -> Reading:
            windows[load] = times
            return super().measure(load, times)

    session(Noting(), options(concurrency=(1, 2, 8), times=Times(1, 5))).measure_all()
    assert windows[Closed(1)] == Times(1, 5)
    assert windows[Closed(2)] == Times(1.6, 6.4)
    assert windows[Closed(8)] == Times(3.2, 12.8)  # by what they take at 2


def test_a_window_in_which_nothing_is_completed_becomes_longer() -> None:
    windows: list[float] = []

    class Slow(Generator):
        def measure(self, load: Load, times: Times) -> Reading:
            windows.append(times.window)
            if times.window < 10:
                raise TooSlow("too slow")
            return super().measure(load, times)

    made = session(Slow(), options(concurrency=(1,)))
    made.measure_all()
    assert windows == [5, 10, 10, 10]  # what was long enough holds
    assert made.error is None
    windows.clear()
    made = session(Slow(), options(concurrency=(1,), times=Times(0.1, 0.5), repetitions=1))
    made.measure_all()
    assert windows == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert made.error == "too slow; give it more seconds or fewer output tokens"


class Clock:
    """Which stands still but for the loads: a window and two seconds beside it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(Generator):
    """Requests take ``seconds`` alone, and so many times as long as there are at a time."""

    def __init__(self, clock: Clock, seconds: float = 1.6) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.windows: list[tuple[str, float]] = []
        self.besides = 2

    def measure(self, load: Load, times: Times) -> Reading:
        self.clock.now += times.total + self.besides
        self.windows.append((str(load), round(times.window, 2)))
        took = self.seconds * (load.concurrency if isinstance(load, Closed) else 1)
        if times.window < took:
            raise TooSlow(f"no request in {times.window:.3g} s")
        each = Percentiles(p50=took * 1e3 / 16, p95=1, p99=1)  # 16 tokens
        reading = super().measure(load, times)
        return reading.model_copy(update={"ttft_ms": each, "itl_ms": each})


def timed(seconds: float, **changed: Any) -> tuple[Session, Timed]:
    clock = Clock()
    generator = Timed(clock, seconds)
    made = Session(generator, Server(), options(**changed), {}, None, clock)  # type: ignore[arg-type]
    made.measure_all()
    return made, generator


def test_a_budget_that_is_enough_changes_nothing() -> None:
    free, given = timed(1.6), timed(1.6, budget_seconds=200)
    assert free[1].windows == given[1].windows
    assert free[1].windows[:2] == [("concurrency 1", 5), ("concurrency 4", 12.8)]


def test_windows_shrink_to_stay_within_a_budget() -> None:
    """Unlimited it would take 3 x (1 + 5 + 2 + 3.2 + 12.8 + 2) = 78 s."""
    made, generator = timed(1.6, budget_seconds=60)
    assert [len(found) for found in made.readings.values()] == [3, 3]
    assert generator.clock.now == pytest.approx(60, abs=0.1)
    alone, four = ([w for name, w in generator.windows if name[-1] == n] for n in "14")
    assert alone[0] == 5  # nothing was known of its requests yet
    assert all(1.6 <= window < 5 for window in alone[1:])
    assert all(6.4 <= window < 12.8 for window in four)
    assert not made.cut
    assert changes(made.readings[Closed(4)], options(budget_seconds=60), cut=False) == [
        f"windows of up to {max(four):.3g} s instead of 5 s, because requests take long here"
    ]
    assert "to stay within the budget of 60 s" in changes(
        made.readings[Closed(1)], options(budget_seconds=60), cut=False
    )[0]  # fmt: skip


def test_a_slow_machine_gets_fewer_repetitions_but_every_load() -> None:
    """Requests of 3 s alone, and of 12 s at four at a time."""
    made, generator = timed(3.0, budget_seconds=30)
    once, four = made.readings[Closed(1)], made.readings[Closed(4)]
    assert 1 <= len(four) <= len(once) < 3
    assert generator.clock.now <= 30
    assert made.cut
    assert made.error is None
    said = changes(four, options(budget_seconds=30), cut=True)
    assert said[-1] == "1 of 3 repetitions, to stay within the budget of 30 s"


@pytest.mark.parametrize("seconds", [4.0, 8.0, 20.0, 100.0])
def test_a_budget_is_never_exceeded_twice(seconds: float) -> None:
    """However slow: for the first window of each load, which is extended while nothing is
    completed, there is twice the budget, and then the window that was asked for."""
    made, generator = timed(seconds, budget_seconds=40)
    assert generator.clock.now <= 80 + 8
    if seconds < 10:
        assert made.error is None
        assert len(made.readings) == 2
    else:
        assert made.error is not None
        assert "that is what the budget of 40 s allows: raise budget_seconds" in made.error


def test_the_load_generators_own_time_is_no_reason_for_windows_of_nothing() -> None:
    """As on a machine that does much else: of each window 20 s are the load generator's."""
    clock = Clock()
    generator = Timed(clock, 1.6)
    generator.besides = 20
    made = Session(generator, Server(), options(budget_seconds=30), {}, None, clock)  # type: ignore[arg-type]
    made.measure_all()
    assert made.error is None
    assert made.cut
    assert [name for name, _ in generator.windows] == ["concurrency 1", "concurrency 4"]
    assert all(window >= 5 for _, window in generator.windows)


def test_a_repetition_that_does_not_complete_is_cut_and_no_error() -> None:
    """The machine becomes ten times slower after the first round."""
    clock = Clock()

    class Slowing(Timed):
        def measure(self, load: Load, times: Times) -> Reading:
            if len(self.windows) == 2:
                self.seconds *= 10
            return super().measure(load, times)

    generator = Slowing(clock, 1.0)
    made = Session(generator, Server(), options(budget_seconds=40), {}, None, clock)  # type: ignore[arg-type]
    made.measure_all()
    assert made.error is None
    assert made.cut
    assert [len(found) for found in made.readings.values()] == [1, 1]
    assert clock.now <= 41


def test_retries_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    timed(6.0, concurrency=(1,), repetitions=1, budget_seconds=100)
    said = capsys.readouterr().err
    assert (
        "concurrency 1: slow machine: no request was completed in 5 s; window extended to 10 s"
        in said
    )
    assert "give it more" not in said


def test_a_budget_ends_the_sweep_and_the_search() -> None:
    made, generator = timed(0.1, concurrency=None, budget_seconds=20)
    assert 1 <= len(made.readings) < 4
    assert generator.clock.now <= 30
    made, generator = timed(0.1, slo=Slo(ttft_ms=500), budget_seconds=100)
    assert made.found is not None
    assert made.found.ended.endswith("readings, when the budget was spent")
    assert generator.clock.now <= 100 + 23  # the last reading may go over it


def test_the_goodput_is_searched_from_what_the_levels_delivered() -> None:
    generator = Generator()
    made = session(generator, options(slo=Slo(ttft_ms=500)))
    made.measure_all()
    assert generator.asked[6] == Open(1.0, "poisson")  # half of the 2 requests/s of the levels
    assert made.found is not None
    assert made.found.rate_per_s <= 3.0 < (made.found.above_per_s or 0) <= 3.3


def test_a_load_that_fails_leaves_the_others() -> None:
    generator = Generator(fails=lambda load, _: "too slow" if load == Closed(4) else None)
    made = session(generator, options())
    made.measure_all()
    assert len(made.readings[Closed(1)]) == 3
    assert Closed(4) not in made.readings
    assert made.error == "too slow"


def test_a_server_that_ends_takes_nothing_with_it() -> None:
    server = Server()

    def fails(_: Load, count: int) -> str | None:
        if count == 3:
            server.exit_code = 137
            return "ended with exit code 137"
        return None

    generator = Generator(fails=fails)
    made = session(generator, options(slo=Slo(ttft_ms=500)), server=server)
    made.measure_all()
    assert len(generator.asked) == 4  # nothing is asked of a server that is gone
    assert [len(found) for found in made.readings.values()] == [2, 1]
    assert made.error == "ended with exit code 137"


class Kept:
    """A run's results, in memory."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def __call__(self, kind: str, *, key: Any, make: Callable[[], Any], shape: type) -> Any:
        assert (kind, shape) == ("load", Reading)
        if str(key) not in self.found:
            self.found[str(key)] = make()
        return self.found[str(key)]


def test_what_an_interrupt_left_is_found_again() -> None:
    kept = Kept()

    def interrupt(_: Load, count: int) -> str | None:
        if count == 4:
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        session(Generator(fails=interrupt), options(), kept).measure_all()
    assert len(kept.found) == 4
    again = Generator()
    made = session(again, options(), kept)
    made.measure_all()
    assert again.asked == [Closed(1), Closed(4)]
    assert [len(found) for found in made.readings.values()] == [3, 3]
    other = Generator()
    session(other, options(times=Times(1, 30)), kept).measure_all()
    assert len(other.asked) == 6  # measured for another time: nothing of it is taken


def test_a_cache_that_was_to_be_off_is_an_error() -> None:
    class Caching(Generator):
        def measure(self, load: Load, times: Times) -> Reading:
            return super().measure(load, times).model_copy(update={"cached_tokens": 60})

    made = session(Caching(), options())
    made.measure_all()
    assert made.readings == {}
    assert "took 60 prompt tokens from a prefix cache" in (made.error or "")
    made = session(Caching(), options(prefix_cache=True))
    made.measure_all()
    assert made.error is None


def test_no_two_loads_ask_the_same(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    target = Target("http://127.0.0.1:1", "m", Variant("v", tmp_path, "gptq", "w4g64", None))
    stem, times = tmp_path / "1", Times(1, 5)
    one, two = (
        scenario(target, WORKLOAD, Closed(4), times, number, stem)["spec"] for number in (1, 2)
    )
    assert one["seed"] != two["seed"]
    assert one["profile"]["streams"] == 4
    assert one["constraints"] == [{"kind": "max_duration", "seconds": 6}]
    rate = scenario(target, WORKLOAD, Open(2.0, "constant"), Times(1, 5, 4), 1, stem)["spec"]
    assert rate["profile"] == {"kind": "constant", "rate": 2.0, "max_concurrency": 40}
    assert rate["constraints"] == [{"kind": "max_duration", "seconds": 10}]
    own = Workload(None, 16, 5, ("first", "second"))
    spec = scenario(target, own, Closed(1), times, 1, stem)["spec"]
    lines = Path(spec["data"][0]["path"]).read_text().splitlines()
    assert set(lines) == {
        f'{{"prompt": "{text}", "output_tokens_count": 16}}' for text in own.texts
    }
    assert len(lines) > 1000


class Stalling:
    """A GuideLLM that hangs now and then, which can't be caused."""

    exit_code = None
    pid = 1
    log = None
    starts = 0

    def error(self, what: str) -> EngineError:
        return EngineError(f"guidellm {what}")


@pytest.mark.parametrize("stalls", [1, 2])
def test_guidellm_is_given_a_second_chance(
    stalls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target("http://127.0.0.1:1", "m", Variant("v", tmp_path, "gptq", "w4g64", None))
    client = Client(tmp_path / "load")
    left = stalls

    def start(self: Client) -> Stalling:
        tmp_path.joinpath("load").mkdir(exist_ok=True)
        return Stalling()

    def wait(*_: Any) -> dict[str, Any] | None:
        nonlocal left
        left -= 1
        return None if left >= 0 else {"benchmarks": [{"answered": True}]}

    monkeypatch.setattr(Client, "_start", start)
    monkeypatch.setattr(Client, "_await", wait)
    with client:
        generator = LoadGenerator(client, target, WORKLOAD)
        if stalls == 1:
            found, _ = generator._run(Closed(1), Times(1, 5), "bench at concurrency 1")
            assert found == {"answered": True}
        else:
            with pytest.raises(EngineError, match=r"guidellm stands still \(bench at"):
                generator._run(Closed(1), Times(1, 5), "bench at concurrency 1")


def test_the_command_line_is_a_section() -> None:
    found = section(
        concurrency="1, 8",
        rates="0.5,2",
        slo="ttft_ms=500,itl_ms=50,share=0.9",
        engines=["vllm"],
        workload="chat",
        prompts=None,
        seconds=None,
    )
    assert found.concurrency == [1, 8]
    assert found.rates == [0.5, 2.0]
    assert found.slo == Slo(ttft_ms=500, itl_ms=50, share=0.9)
    assert found.lengths == (512, 128)
    assert found.seconds == BenchSection().seconds
    none = {"rates": None, "slo": None, "engines": ()}
    assert section(concurrency="auto", **none).concurrency == "auto"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"concurrency": "x"}, r"--concurrency .*0: Input should be a valid integer"),
        ({"concurrency": "0,1"}, r"--concurrency .*greater than or equal to 1"),
        ({"rates": "-1"}, r"--rate .*greater than 0"),
        ({"slo": "tft_ms=5"}, r"--slo .*tft_ms"),
        ({"slo": "share=0.9"}, r"--slo.*needs ttft_ms or itl_ms"),
        ({"workload": "chat", "prompt_tokens": 5}, "either workload, or lengths"),
        ({"prompts": "a.jsonl", "prompt_tokens": 5}, "prompts have lengths of their own"),
        ({"output_tokens": 1}, "--output-tokens.*greater than or equal to 2"),
    ],
)
def test_command_lines_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    base = {"concurrency": "1", "rates": None, "slo": None, "engines": ()}
    with pytest.raises(RecipeError, match=said):
        section(**{**base, **given})


@pytest.mark.parametrize(
    "wrong",
    [{"concurrency": (1, 1)}, {"concurrency": ()}, {"rates": (1.0, 1.0)}],
)
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        options(**wrong)


def test_slots_and_context_fit_the_loads() -> None:
    assert options().slots == 4
    assert options(concurrency=None).slots == 64
    assert options(concurrency=(), rates=(1.0,)).slots == 64
    # A quarter more than prompt and answer, in blocks of 64.
    assert Workload.synthetic(512, 128).context == 832
    assert Workload.synthetic(8, 2).context == 192
