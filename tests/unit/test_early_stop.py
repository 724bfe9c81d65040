"""Questions asked in random order until decided: who is asked what, and when it ends."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.engines.base import TokenScores
from quantkit.errors import EvaluationError
from quantkit.evaluation import questions
from quantkit.evaluation.compare import Compared, compare
from quantkit.evaluation.early_stop import EarlyStop
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.plan import EvaluationPlan
from quantkit.evaluation.samples import Evaluated
from quantkit.evaluation.tasks import TaskResult
from quantkit.ledger import REFERENCE
from quantkit.ledger.drift import Comparison, Flips, Verdict
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.engine_config import Option
from quantkit.reports.drifts import pairs
from quantkit.reports.pages import html
from tests import ledgers
from tests.models import make_checkpoint

TOTAL = 400


class _Choosing:
    """A model that picks A, the right answer everywhere, but B after a part of the prompts."""

    def __init__(self, wrong: float, letters: list[int]) -> None:
        self.wrong = wrong
        self.letters = letters

    def likelihoods(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[TokenScores]:
        for sequence, start in zip(sequences, first, strict=True):
            draw = zlib.crc32(bytes(str(list(sequence[:start])), "ascii")) % 1000 / 1000
            pick = self.letters[1 if draw < self.wrong else 0]
            hits = torch.tensor([token == pick for token in sequence[start:]])
            yield TokenScores(torch.where(hits, -0.1, -5.0), hits)

    def generate(self, *_: Any) -> Iterator[list[int]]:
        raise NotImplementedError


class _Engine:
    """Says how often each model was loaded; never two at a time."""

    name = "choosing"
    options: dict[str, Option] = {}  # noqa: RUF012

    def __init__(self, wrong: dict[Path, float], letters: list[int]) -> None:
        self.wrong = wrong
        self.letters = letters
        self.loads: list[str] = []
        self.loaded = 0

    def version(self) -> str:
        return "1"

    @contextmanager
    def language_model(self, model: Checkpoint, context: int) -> Iterator[_Choosing]:
        assert self.loaded == 0
        self.loaded += 1
        self.loads.append(model.id)
        yield _Choosing(self.wrong[model.path], self.letters)
        self.loaded -= 1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """The source, one that is worse, one that is a little worse, one that is the same."""
    names = ("source", "worse", "near", "same")
    directory = tmp_path_factory.mktemp("models")
    return [Checkpoint.open(make_checkpoint(directory / name)) for name in names]


@pytest.fixture
def engine(models: list[Checkpoint], monkeypatch: pytest.MonkeyPatch) -> _Engine:
    made_up = [
        {"subject": f"s{i % 3}", "question": f"Question {i}?", "choices": list("wxyz"), "answer": 0}
        for i in range(TOTAL)
    ]
    monkeypatch.setattr(questions, "dev_questions", lambda: made_up)
    letters = [models[0].tokenizer.encode(f" {letter}")[-1] for letter in "AB"]
    wrong = dict(zip((model.path for model in models), (0.0, 0.3, 0.01, 0.0), strict=True))
    found = _Engine(wrong, letters)
    monkeypatch.setattr(EvaluationPlan, "engine_of", lambda *_: found)
    return found


def _plan(models: list[Checkpoint], **more: Any) -> EvaluationPlan:
    return EvaluationPlan(models[0].tokenizer, 2048, tasks=("mmlu_dev",), **more)


def _run(models: list[Checkpoint], stop: EarlyStop, plan: EvaluationPlan) -> dict[str, Evaluated]:
    """As the verbs do: the variants, then the source."""
    found = {}
    for model in models[1:]:
        found[model.id] = evaluate(model, {}, plan, early_stop=stop)
        stop.note(found[model.id])
    return {REFERENCE: evaluate(models[0], {}, plan, early_stop=stop), **found}


def _asked(found: dict[str, Evaluated]) -> dict[str, int]:
    return {name: one.metrics["mmlu_acc"].n for name, one in found.items()}


def test_each_is_asked_until_its_verdict_and_the_reference_as_far_as_needed(
    models: list[Checkpoint], engine: _Engine
) -> None:
    plan = _plan(models)
    found = _run(models, EarlyStop(models[0], plan, 5.0, 3), plan)
    asked = _asked(found)
    assert asked["worse"] < asked["same"] < TOTAL
    assert asked[REFERENCE] == max(asked.values())
    # The reference is known from "near": nobody puts the next away for it.
    assert asked["same"] < asked["near"]
    assert engine.loads.count("same") == 1
    assert engine.loaded == 0
    by_pair = {(c.a, c.b): c for c in compare(found, 5.0)}
    assert by_pair[REFERENCE, "worse"].verdict == "worse"
    assert by_pair[REFERENCE, "same"].verdict == "equivalent"
    between = by_pair["worse", "same"]
    assert between.verdict == "better"
    assert (between.n, between.of) == (asked["worse"], TOTAL)
    groups = Compared(found, list(by_pair.values())).groups["mmlu_acc", None]
    assert groups[0] == ["worse"]
    assert {REFERENCE, "same"} <= set(groups[1])


def test_the_answers_are_those_of_all_questions_in_a_random_order(
    models: list[Checkpoint], engine: _Engine
) -> None:
    plan = _plan(models)
    early = _run(models[:2], EarlyStop(models[0], plan, 5.0, 1), plan)["worse"]
    everything = evaluate(models[1], {}, plan)
    given = early.answers["mmlu_acc"]
    whole = everything.answers["mmlu_acc"]
    stop = EarlyStop(models[0], plan, 5.0, 1)
    asked = stop.measure(models[1], engine, "mmlu_dev").answers
    numbers = [answer["doc"] for answer in asked]
    assert len(set(numbers)) == len(numbers) == len(given.right)
    assert given.right == [whole.right[number] for number in numbers]
    assert given.picks == [whole.picks[number] for number in numbers]
    assert given.subjects == [whole.subjects[number] for number in numbers]
    assert numbers != sorted(numbers)
    assert early.metrics["mmlu_acc"].value == pytest.approx(sum(given.right) / len(given.right))
    # What was stopped is never compared with what was not.
    with pytest.raises(EvaluationError, match="until: 'decided' and None"):
        compare({REFERENCE: early, "all": everything}, 5.0)


def test_a_table_of_pairs_says_how_many_were_asked() -> None:
    def comparison(a: str, b: str, n: int, verdict: Verdict, more: int | None) -> Comparison:
        return Comparison(
            measure="mmlu_acc", a=a, b=b, unit="points", drift=-3.25, low=-6.0, high=-0.5, n=n,
            of=282, p=0.0001, p_adjusted=0.0003, p_equivalent=1.0, tolerance=1.0, verdict=verdict,
            more=more, flips=Flips(right_to_wrong=9, wrong_to_right=3, wrong_to_other=0),
        )  # fmt: skip

    titles, rows = pairs([
        comparison("reference", "x", 96, "worse", None),
        comparison("reference", "y", 282, "undecided", 3_417),
        comparison("x", "y", 96, "undecided", None),
    ])  # fmt: skip
    assert titles == [
        "mmlu_acc ±1 points", "drift from reference", "95 % interval", "p", "questions",
        "against reference", "against x",
    ]  # fmt: skip
    said = ["-3.2 points", "-6.0 to -0.5", "< 0.001"]
    said = [text.replace("-", "\N{MINUS SIGN}") for text in said]
    assert rows == [
        ["x", *said, "96 of 282", "worse", ""],
        ["y", *said, "282 of 282", "undecided (3,500 more)", "undecided (out of reach)"],
    ]


def test_the_report_says_after_how_many_questions_it_was_decided() -> None:
    ledger = ledgers.quickstart()
    stopped = [
        one.model_copy(update={"n": 96, "of": 282}) if one.flips else one
        for one in ledger.comparisons
    ]
    page = html(ledger.model_copy(update={"comparisons": stopped}))
    assert "up to 282 questions in random order until decided" in page
    assert page.count('<td class="num">96 of 282</td>') == 5
    assert "after 96 of 282 questions)" in page
    assert "96 of" not in html(ledger)


def test_a_limit_is_what_there_is_to_ask(models: list[Checkpoint], engine: _Engine) -> None:
    plan = _plan(models, limit=60)
    found = _run([models[0], models[2]], EarlyStop(models[0], plan, 1.0, 1), plan)
    assert found["near"].answers["mmlu_acc"].total == 60
    assert _asked(found)["near"] <= 60


def test_without_variants_the_reference_answers_all(
    models: list[Checkpoint], engine: _Engine
) -> None:
    plan = _plan(models)
    assert _asked(_run(models[:1], EarlyStop(models[0], plan, 5.0, 0), plan)) == {REFERENCE: TOTAL}


def test_what_was_asked_is_kept(models: list[Checkpoint], engine: _Engine) -> None:
    kept: dict[str, TaskResult] = {}

    def keep(model: Any, key: Any, make: Any, shape: type[TaskResult]) -> TaskResult:
        assert shape is TaskResult
        name = f"{model.id} {key}"
        if name not in kept:
            kept[name] = make()
        return kept[name]

    plan = _plan(models)
    first = _run(models, EarlyStop(models[0], plan, 5.0, 3, keep), plan)
    engine.loads.clear()
    assert _run(models, EarlyStop(models[0], plan, 5.0, 3, keep), plan) == first
    assert engine.loads == []


def test_a_task_without_an_accuracy_cannot_be_decided(
    models: list[Checkpoint], engine: _Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.evaluation import early_stop

    real = early_stop.run_task

    def without(*args: Any, **more: Any) -> TaskResult:
        found = real(*args, **more)
        for answer in found.answers:
            answer["right"] = {}
        return found

    monkeypatch.setattr(early_stop, "run_task", without)
    plan = _plan(models)
    with pytest.raises(EvaluationError, match="mmlu_dev: has no accuracy"):
        _run(models[:2], EarlyStop(models[0], plan, 5.0, 1), plan)


def test_with_two_accuracies_it_ends_where_both_are_settled(
    models: list[Checkpoint], engine: _Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is the same for all models: equivalent, which takes longer than "worse" does."""
    from quantkit.evaluation import early_stop

    real, plan = early_stop.run_task, _plan(models)
    alone = _asked(_run(models, EarlyStop(models[0], plan, 5.0, 3), plan))

    def twice(*args: Any, **more: Any) -> TaskResult:
        found = real(*args, **more)
        for answer in found.answers:
            answer["right"]["mmlu_exact_match"] = answer["doc"] % 2 == 0
            answer["pick"]["mmlu_exact_match"] = "x"
        found.metrics["mmlu_exact_match"] = found.metrics["mmlu_acc"]
        return found

    monkeypatch.setattr(early_stop, "run_task", twice)
    found = _run(models, EarlyStop(models[0], plan, 5.0, 3), plan)
    assert _asked(found)["worse"] == alone["same"] > alone["worse"]
    by_pair = {(c.measure, c.b): c.verdict for c in compare(found, 5.0) if c.a == REFERENCE}
    assert by_pair["mmlu_acc", "worse"] == "worse"
    assert by_pair["mmlu_exact_match", "worse"] == "equivalent"
    assert found["worse"].metrics["mmlu_exact_match"].value == pytest.approx(0.5, abs=0.1)
