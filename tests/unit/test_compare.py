"""Pairs of rows: what the ledger says of them."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest

from quantkit.errors import EvaluationError
from quantkit.evaluation.compare import Compared, compare, verdict
from quantkit.evaluation.samples import Answers, Evaluated, MeasuredText, flips
from quantkit.ledger import Ledger, Metric
from quantkit.ledger.drift import ALPHA, Comparison
from tests import ledgers
from tests.engine_configs import config


def _metric(value: float, **protocol: object) -> Metric:
    return Metric(
        value=value, stderr=0.1, n=1, reference=None, protocol=protocol, engine=config("x 1")
    )


def _text(nll: list[float], kld: list[float], version: int = 2) -> Evaluated:
    return Evaluated(texts={"a": _on_text(nll, kld, version)})


def _on_text(nll: list[float], kld: list[float], version: int = 2) -> MeasuredText:
    return MeasuredText(
        metrics={
            "ppl": _metric(1.0, metrics_version=version),
            "kld_mean": _metric(1.0, metrics_version=version),
        },
        windows={"ppl": nll, "kld_mean": kld},
    )


def _quiz(right: str, picks: str, subjects: list[str] | None = None) -> Evaluated:
    """``"110"``: right, right, wrong; ``"AAB"``: what was picked."""
    return Evaluated(
        metrics={"mmlu_acc": _metric(0.5)},
        answers={
            "mmlu_acc": Answers(
                subjects=subjects or ["all"] * len(right),
                right=[mark == "1" for mark in right],
                picks=["ABCD".index(pick) for pick in picks],
            )
        },
    )


def _one(found: list[Comparison], measure: str, a: str, b: str) -> Comparison:
    (match,) = [c for c in found if (c.measure, c.a, c.b) == (measure, a, b)]
    return match


def test_flips_by_hand() -> None:
    before = _quiz("110000", "AABBCC").answers["mmlu_acc"]
    after = _quiz("101000", "ABABCD").answers["mmlu_acc"]
    changed = flips(before, after)
    assert (changed.right_to_wrong, changed.wrong_to_right, changed.wrong_to_other) == (1, 1, 1)
    assert flips(before, before).model_dump() == dict.fromkeys(changed.model_dump(), 0)


def test_accuracy_by_hand() -> None:
    # Of 40 questions 9 are lost and 1 is won: -20 points, p = 2 x (1 + 10) / 2^10.
    reference = _quiz("1" * 20 + "0" * 20, "A" * 40)
    variant = _quiz("1" * 11 + "0" * 9 + "1" + "0" * 19, "A" * 11 + "B" * 9 + "A" * 20)
    (found,) = compare({"reference": reference, "v": variant}, tolerance=1.0)
    assert (found.measure, found.a, found.b, found.unit) == (
        "mmlu_acc", "reference", "v", "points",
    )  # fmt: skip
    assert found.drift == pytest.approx(-20)
    assert found.p == found.p_adjusted == pytest.approx(22 / 1024)
    assert (found.verdict, found.apart, found.more, found.n) == ("worse", True, None, 40)
    assert found.low is not None
    assert found.high is not None
    assert found.low < -20 < found.high < 0


def test_perplexity_is_a_ratio_over_windows() -> None:
    rng = np.random.default_rng(0)
    nll = rng.normal(3, 0.4, 40)
    up = (nll + math.log(1.05) + rng.normal(0, 0.01, 40)).tolist()
    near = (nll + rng.normal(0, 0.004, 40)).tolist()
    zero, kld = [0.0] * 40, rng.uniform(0.01, 0.02, 40)
    rows = {
        "reference": _text(nll.tolist(), zero),
        "near": _text(near, kld.tolist()),
        "up": _text(up, (2 * kld).tolist()),
    }
    found = compare(rows, tolerance=1.0)
    far = _one(found, "ppl", "reference", "up")
    assert far.drift == pytest.approx(100 * (math.exp(np.mean(up) - np.mean(nll)) - 1))
    assert far.drift == pytest.approx(5, abs=0.5)
    assert (far.verdict, far.unit, far.n) == ("worse", "percent", 40)
    same = _one(found, "ppl", "reference", "near")
    assert (same.verdict, same.tolerance) == ("equivalent", 1.0)
    strict = _one(compare(rows, tolerance=0.01), "ppl", "reference", "near")
    assert strict.verdict == "undecided"
    assert strict.more is not None
    # Divergences are compared among the variants; nearer to the reference is better.
    assert [(c.a, c.b) for c in found if c.measure == "kld_mean"] == [("near", "up")]
    assert _one(found, "kld_mean", "near", "up").verdict == "worse"


def test_a_broken_model_has_finite_numbers_and_a_verdict() -> None:
    rows = {"reference": _text([3.0, 3.1], [0, 0]), "broken": _text([90.0, 500.0], [80, 480])}
    found = _one(compare(rows, tolerance=1.0), "ppl", "reference", "broken")
    assert found.verdict == "undecided"  # two windows are few, even for this
    assert found.high is not None
    assert math.isfinite(found.high)


def test_verdicts() -> None:
    assert verdict(1.0, 0.2, 0.3, True) == "undecided"
    assert verdict(1.0, ALPHA, 0.3, True) == "worse"
    assert verdict(1.0, ALPHA, 0.3, False) == "better"
    assert verdict(-1.0, ALPHA, None, True) == "better"
    # What is certain, and too small to matter, is what the user called no difference.
    assert verdict(1.0, 1e-9, ALPHA, True) == "equivalent"


def test_subjects_are_corrected_for_their_number() -> None:
    subjects = [name for name in ("law", "art", "logic") for _ in range(10)]
    before = _quiz("1" * 30, "A" * 30, subjects)
    after = _quiz("0" * 8 + "1" * 2 + "0" + "1" * 19, "B" * 8 + "A" * 2 + "B" + "A" * 19, subjects)
    (found,) = compare({"reference": before, "v": after}, tolerance=1.0)
    law, art = found.changed_subjects
    assert found.subjects == 3
    assert (law.subject, law.n, law.right_to_wrong) == ("law", 10, 8)
    assert law.p_adjusted == pytest.approx(3 * 2 / 2**8)
    assert (art.subject, art.right_to_wrong, art.p_adjusted) == ("art", 1, 1)


def test_many_equal_variants_are_told_apart_in_at_most_5_percent_of_reports() -> None:
    """Five variants that flip answers and move windows at random; 15 pairs share one α."""
    rng = np.random.default_rng(5)
    runs, wrong = 40, 0
    for _ in range(runs):
        rows = {}
        nll, right = rng.normal(3, 0.4, 12), rng.random(282) < 0.3
        for name in ("reference", "a", "b", "c", "d", "e"):
            moved = (nll + rng.normal(0, 0.01, 12)).tolist()
            marks = np.where(rng.random(282) < 0.15, rng.random(282) < 0.5, right)
            quiz = _quiz("".join("01"[int(mark)] for mark in marks), "A" * 282)
            rows[name] = Evaluated(
                texts={"a": MeasuredText(metrics={"ppl": _metric(1.0)}, windows={"ppl": moved})},
                metrics=quiz.metrics,
                answers=quiz.answers,
            )
        found = compare(rows, tolerance=1.0)
        assert len(found) == 30
        wrong += sum(
            any(c.apart for c in found if c.measure == measure) for measure in ("ppl", "mmlu_acc")
        )
    assert wrong / (2 * runs) <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / (2 * runs))


def test_other_protocols_and_versions_are_refused() -> None:
    nll = [random.Random(i).random() for i in range(4)]
    rows = {"reference": _text(nll, nll), "old": _text(nll, nll, version=1)}
    with pytest.raises(
        EvaluationError, match=r"reference and old: ppl on a: .*metrics_version: 2 and 1"
    ):
        compare(rows, tolerance=1.0)
    quiz = _quiz("10", "AA")
    other = quiz.model_copy(update={"metrics": {"mmlu_acc": _metric(0.5, shots=[5])}})
    with pytest.raises(EvaluationError, match="mmlu_acc: measured in two ways"):
        compare({"reference": quiz, "v": other}, tolerance=1.0)


def test_what_was_not_measured_is_not_compared() -> None:
    assert compare({"reference": Evaluated(), "v": _quiz("1", "A")}, tolerance=1.0) == []


def test_a_ledger_keeps_comparisons_and_refuses_another_schema(tmp_path: Path) -> None:
    ledger = ledgers.quickstart()
    path = tmp_path / "ledger.json"
    ledger.write(path)
    assert Ledger.read(path) == ledger
    path.write_text(path.read_text().replace('"schema_version": 5', '"schema_version": 4'))
    with pytest.raises(EvaluationError, match=r"not a ledger this version reads: schema_version"):
        Ledger.read(path)


def test_texts_are_compared_each_for_itself_and_corrected_together() -> None:
    rng = np.random.default_rng(3)
    nll, noise = rng.normal(3, 0.4, 30), rng.normal(0, 0.01, (2, 30))
    zero = [0.0] * 30

    def row(shift: float) -> Evaluated:
        """Worse by ``shift`` on the second text only, whose windows are other ones and fewer."""
        easy = MeasuredText(
            metrics={"ppl": _metric(1.0, text="easy")},
            windows={"ppl": (nll + noise[0] * (shift > 0)).tolist()},
        )
        hard = _on_text((nll[:20] + 1 + shift + noise[1][:20]).tolist(), zero[:20])
        return Evaluated(texts={"easy": easy, "hard": hard})

    rows = {"reference": row(0.0), "v": row(0.05)}
    found = compare(rows, tolerance=1.0)
    assert [(c.measure, c.text, c.n) for c in found] == [("ppl", "easy", 30), ("ppl", "hard", 20)]
    easy, hard = found
    assert hard.drift == pytest.approx(100 * math.expm1(0.05))
    assert (easy.verdict, hard.verdict) == ("equivalent", "worse")
    # Two pairs of one measure: Holm doubles the smaller p.
    assert hard.p_adjusted == pytest.approx(2 * hard.p)
    (alone,) = compare({n: Evaluated(texts={"easy": r.texts["easy"]}) for n, r in rows.items()}, 1)
    assert easy.p == pytest.approx(alone.p)
    groups = Compared(rows, found).groups
    assert groups == {
        ("ppl", "easy"): [["reference", "v"]],
        ("ppl", "hard"): [["reference"], ["v"]],
    }


def test_a_row_that_lacks_a_text_is_compared_on_the_others() -> None:
    both = Evaluated(texts={"a": _on_text([1.0, 2.0], [0, 0]), "b": _on_text([1.0], [0])})
    found = compare({"reference": both, "v": _text([1.0, 2.1], [0.1, 0.1])}, tolerance=1.0)
    assert [(c.measure, c.text) for c in found] == [("ppl", "a")]
