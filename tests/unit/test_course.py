"""The steps of a run: their order, what is said of them, and how much is thought to be left."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.variant import Variant
from quantkit.producers.convert import plan
from quantkit.reports.underway import Underway, roughly
from quantkit.runs.course import Pace, Step, run_course
from quantkit.runs.directory import open_run
from quantkit.runs.recipe import Recipe, load_recipe
from quantkit.runs.rows import RowBuilder
from quantkit.runs.stages import Texts
from quantkit.runs.steps import Work


def nothing() -> None: ...


def test_a_stage_takes_as_long_as_it_did_and_others_as_all_together() -> None:
    pace = Pace()
    ahead = [Step("b", "evaluate", 10, nothing), Step("b", "bench", 30, nothing)]
    assert pace.seconds(ahead) == 40
    pace.note(Step("a", "convert", 5, nothing), 20)
    assert pace.seconds(ahead) == 160  # four times as long as usual
    pace.note(Step("a", "evaluate", 10, nothing), 10)
    assert pace.seconds(ahead) == pytest.approx(10 + 30 * 30 / 15)
    # What an earlier run did says nothing of the machine.
    pace.note(Step("c", "evaluate", 10, nothing), 0.1)
    assert pace.seconds(ahead) == pytest.approx(70)


def test_each_step_is_told_before_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    done: list[str] = []
    told: list[Underway] = []

    def work(name: str, seconds: float) -> Callable[[], None]:
        def act() -> None:
            nonlocal now
            now += seconds
            done.append(name)

        return act

    def publish(underway: Underway) -> None:
        assert len(done) == underway.done
        told.append(underway)

    steps = [
        Step("a", "convert", 30, work("1", 60)),
        Step("b", "convert", 30, work("2", 60)),
        Step("a", "bench", 120, work("3", 90)),
    ]
    run_course(steps, publish, lambda: now)
    assert done == ["1", "2", "3"]
    assert [one.step for one in told] == ["a: convert", "b: convert", "a: bench"]
    assert [one.waiting for one in told] == [("a", "b"), ("b", "a"), ("a",)]
    assert [one.seconds_left for one in told] == [180, 300, 240]
    assert capsys.readouterr().err.splitlines() == [
        "[1/3] a: convert (about 3 min left)",
        "[2/3] b: convert (about 5 min left)",
        "[3/3] a: bench (about 4 min left)",
    ]


def test_what_ends_a_run_is_told_and_passed_on() -> None:
    told: list[Underway] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    steps = [Step("a", "convert", 1, nothing), Step("a", "bench", 1, interrupt)]
    with pytest.raises(KeyboardInterrupt):
        run_course(steps, told.append)
    assert [(one.step, one.ended) for one in told] == [
        ("a: convert", False), ("a: bench", False), ("a: bench", True),
    ]  # fmt: skip


def test_an_interrupt_while_the_report_is_written_is_told_too() -> None:
    told: list[Underway] = []

    def publish(underway: Underway) -> None:
        told.append(underway)
        if not underway.ended:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_course([Step("a", "convert", 1, nothing)], publish)
    assert [one.ended for one in told] == [False, True]


def test_a_report_that_cannot_be_written_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []

    def fail(_: Underway) -> None:
        raise OSError("no space left")

    run_course([Step("a", "convert", 1, lambda: done.append(1))], fail)
    assert done == [1]
    assert "could not be written at this step: OSError('no space left')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "10 s"), (34, "30 s"), (54, "50 s"), (55, "1 min"), (230, "4 min"), (3400, "1 h"),
     (5000, "1.5 h"), (20000, "5.5 h")],
)  # fmt: skip
def test_an_estimate_is_said_as_roughly_as_it_is_known(seconds: float, said: str) -> None:
    assert roughly(seconds) == said


def _work(recipe: Recipe, tmp_path: Path) -> tuple[Work, list[str]]:
    from contextlib import ExitStack

    source = Checkpoint.open(recipe.source)
    plans = [plan(source, spec) for spec in recipe.specs]
    with open_run(tmp_path / "run") as directory, ExitStack() as stack:
        texts = Texts(None, {}, None)
        work = Work(recipe, source, plans, texts, directory, stack, force=False)
        return work, [re.sub("^(gguf|gptq|awq)-.*:", r"\1:", str(step)) for step in work.steps()]


def test_the_cheapest_evidence_comes_first(tiny_llama: Path, tmp_path: Path) -> None:
    """GGUF of a recipe that names it last, all of one pass together; then each calibrated one
    whole; the source on its serving engine in the end."""
    convert = "convert=[awq:w4g64, gguf:Q8_0, gptq:w4g64, gguf:Q4_0]"
    recipe = load_recipe("quickstart", [f"source={tiny_llama}", convert])
    work, steps = _work(recipe, tmp_path)
    assert steps == [
        "reference: prepare", "reference: evaluate",
        "gguf: convert", "gguf: convert", "gguf: evaluate", "gguf: evaluate",
        "gguf: bench", "gguf: split", "gguf: bench", "gguf: split",
        "awq: convert", "awq: evaluate", "awq: bench", "awq: split",
        "gptq: convert", "gptq: evaluate", "gptq: bench", "gptq: split",
        "reference: bench", "reference: noise floor",
    ]  # fmt: skip
    assert [row.id for row in work.rows] == [
        "reference", "awq-w4g64", "gguf-Q8_0", "gptq-w4g64", "gguf-Q4_0",
    ]  # fmt: skip


def test_with_an_early_stop_the_source_answers_last(tiny_llama: Path, tmp_path: Path) -> None:
    settings = (
        "convert=[gguf:Q8_0, gptq:w4g64]",
        "evaluate.until=decided",
        "evaluate.split_windows=null",
    )
    recipe = load_recipe("quickstart", [f"source={tiny_llama}", *settings])
    _, steps = _work(recipe, tmp_path)
    assert steps == [
        "reference: prepare", "gguf: convert", "gguf: evaluate", "gptq: convert", "gptq: evaluate",
        "reference: evaluate", "gguf: bench", "gptq: bench", "reference: bench",
    ]  # fmt: skip


def test_only_what_the_recipe_asks_for(tiny_llama: Path, tmp_path: Path) -> None:
    settings = ("convert=[gguf:Q8_0]", "evaluate=null", "bench=null")
    recipe = load_recipe("quickstart", [f"source={tiny_llama}", *settings])
    assert _work(recipe, tmp_path)[1] == ["gguf: convert"]


def test_variants_of_one_pass_share_its_time(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("quantkit.runs.rows.time.monotonic", lambda: now)
    convert = "convert=[gguf:Q8_0, gguf:Q4_0, gptq:w4g64]"
    recipe = load_recipe("quickstart", [f"source={tiny_llama}", convert, "evaluate=null"])
    work, _ = _work(recipe, tmp_path)
    made = Variant("v", tmp_path, "gguf", "Q8_0", None)

    def maker(seconds: float) -> Callable[[], Variant]:
        def make() -> Variant:
            nonlocal now
            now += seconds
            return made

        return make

    work._makers = dict(zip(work._makers, map(maker, (9.0, 1.0, 50.0)), strict=True))
    for step in work.steps():
        if step.stage == "convert":
            step.work()
    taken: dict[str, RowBuilder] = {row.id: row for row in work.rows}
    assert taken["gguf-Q8_0"].seconds == taken["gguf-Q4_0"].seconds == {"convert": 5.0}
    assert taken["gptq-w4g64"].seconds == {"convert": 50.0}
