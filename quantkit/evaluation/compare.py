"""Every pair of a run's rows: how far apart they are, and whether the data can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from quantkit.evaluation import paired, sequential
from quantkit.evaluation.paired import Difference
from quantkit.evaluation.samples import Answers, Evaluated, flips, gaps
from quantkit.ledger import REFERENCE, Metric, require_comparable
from quantkit.ledger.drift import ALPHA, Comparison, Flips, SubjectDrift, Verdict
from quantkit.system.table import Table, Tabular

_LARGEST = 700.0
"""e to this is still a number."""


@dataclass(frozen=True, repr=False)
class Compared(Tabular):
    """Models that were measured alike, and what every pair of them shows."""

    models: dict[str, Evaluated]
    comparisons: list[Comparison]

    @property
    def groups(self) -> dict[tuple[str, str | None], list[list[str]]]:
        """Ids by measure and text, from the lowest value up, in groups that the data can tell
        apart."""
        measures = dict.fromkeys((one.measure, one.text) for one in self.comparisons)
        return {
            (name, text): groups(name, text, self._metrics(name, text), self.comparisons)
            for name, text in measures
        }

    def table(self) -> Table:
        """One row a metric of a model."""
        return Table.of_records(
            [
                {
                    "variant": id_,
                    "text": text,
                    "metric": name,
                    "value": metric.value,
                    "stderr": metric.stderr,
                    "n": metric.n,
                    "engine": str(metric.engine),
                }
                for id_, model in self.models.items()
                for text, metrics in (
                    *((text, one.metrics) for text, one in model.texts.items()),
                    (None, model.metrics),
                )
                for name, metric in metrics.items()
            ]
        )

    def _metrics(self, name: str, text: str | None) -> dict[str, Metric]:
        return {
            id_: where[name]
            for id_, model in self.models.items()
            if name in (where := model.metrics if text is None else model.texts[text].metrics)
        }


@dataclass(frozen=True)
class _Pair:
    """Two rows in one measure; the difference in the unit in which it is tested."""

    a: str
    b: str
    difference: Difference
    text: str | None = None
    of: int | None = None
    flips: Flips | None = None
    subjects: tuple[int, list[SubjectDrift]] | None = None


@dataclass(frozen=True)
class _Scale:
    """How a difference is shown: ``show`` turns the tested value into ``unit``."""

    unit: Literal["percent", "nats", "points"]
    lower_is_better: bool
    tolerance: float | None
    """As said, in ``unit``."""

    @property
    def tested(self) -> float | None:
        """The tolerance as it is tested: a ratio's logarithm, a share."""
        if self.tolerance is None:
            return None
        return math.log1p(self.tolerance / 100) if self.unit == "percent" else self.tolerance / 100

    def show(self, value: float) -> float:
        """A tested value in ``unit``."""
        if self.unit == "percent":
            # Two windows of a broken model: the interval's end may be beyond any number.
            return 100 * math.expm1(min(value, _LARGEST))
        return 100 * value if self.unit == "points" else value


def compare(rows: Mapping[str, Evaluated], tolerance: float) -> list[Comparison]:
    """Compare each row with each later one in whatever both were measured in.

    ``tolerance``: points of accuracy, and percent of perplexity, within which two count as
    equivalent. Divergences from the reference are compared among the variants only, and what was
    measured on one text only with what was measured on the same. Raise EvaluationError where two
    rows were not measured by the same protocol and version.
    """
    percent = _Scale("percent", True, tolerance)
    found = _compared("ppl", _window_pairs(rows, "ppl", percent), percent)
    variants = {id_: row for id_, row in rows.items() if id_ != REFERENCE}
    nats = _Scale("nats", True, None)
    found += _compared("kld_mean", _window_pairs(variants, "kld_mean", nats), nats)
    points = _Scale("points", False, tolerance)
    for name in sorted({name for row in rows.values() for name in row.answers}):
        found += _compared(name, _question_pairs(rows, name, points), points)
    return found


def groups(
    measure: str,
    text: str | None,
    metrics: Mapping[str, Metric],
    comparisons: Sequence[Comparison],
) -> list[list[str]]:
    """Ids from the lowest value up, in groups that the data tell apart; unranked within a group.

    Only those of ``metrics`` that took part in a comparison.
    """
    apart = {
        frozenset((one.a, one.b)): one.apart
        for one in comparisons
        if (one.measure, one.text) == (measure, text)
    }
    known = {id_ for pair in apart for id_ in pair}
    ids = sorted((id_ for id_ in metrics if id_ in known), key=lambda id_: metrics[id_].value)
    return paired.groups(ids, lambda a, b: apart.get(frozenset((a, b)), False))


def verdict(drift: float, p: float, p_equivalent: float | None, lower_is_better: bool) -> Verdict:
    """The verdict on the second of a pair, by adjusted p-values.

    Within the tolerance comes first: what the user called no difference is none, however surely
    it is seen.
    """
    if p_equivalent is not None and p_equivalent <= ALPHA:
        return "equivalent"
    if p <= ALPHA:
        return "better" if (drift < 0) == lower_is_better else "worse"
    return "undecided"


def _window_pairs(rows: Mapping[str, Evaluated], name: str, scale: _Scale) -> list[_Pair]:
    """All pairs on each text; the texts together share one α."""
    found = []
    for text in dict.fromkeys(text for row in rows.values() for text in row.texts):
        measured = {id_: row.texts[text] for id_, row in rows.items() if text in row.texts}
        having = {id_: one for id_, one in measured.items() if name in one.windows}
        for (a, one), (b, other) in combinations(having.items(), 2):
            what = f"{a} and {b}: {name} on {text}"
            require_comparable(what, one.metrics[name], other.metrics[name])
            windows = (one.windows[name], other.windows[name])
            found.append(_Pair(a, b, paired.of_means(*windows, scale.tested), text))
    return found


def _question_pairs(rows: Mapping[str, Evaluated], name: str, scale: _Scale) -> list[_Pair]:
    measured = {id_: row for id_, row in rows.items() if name in row.answers}
    found = []
    for (a, one), (b, other) in combinations(measured.items(), 2):
        require_comparable(f"{a} and {b}: {name}", one.metrics[name], other.metrics[name])
        before, after = one.answers[name], other.answers[name]
        if before.total is not None:
            # Asked in one order, and stopped at different questions.
            both = min(len(before.right), len(after.right))
            before, after = before.first(both), after.first(both)
        difference = _difference(before, after, scale.tested or 0.0)
        subjects = _subjects(before, after) if a == REFERENCE else None
        changed = flips(before, after)
        found.append(_Pair(a, b, difference, None, before.total, changed, subjects))
    return found


def _difference(before: Answers, after: Answers, tolerance: float) -> Difference:
    """Tests over all questions, or sequential ones that may be looked at after each question."""
    if before.total is not None:
        return sequential.of_answers(gaps(before, after), before.total, tolerance)
    changed = flips(before, after)
    lost, gained = changed.right_to_wrong, changed.wrong_to_right
    return paired.of_answers(lost, gained, len(before.right), tolerance)


def _subjects(before: Answers, after: Answers) -> tuple[int, list[SubjectDrift]]:
    """How many subjects there are, and those whose score an answer changed."""
    names = list(dict.fromkeys(before.subjects))
    parts = [before.of(name) for name in names]
    changes = [flips(part, after.of(name)) for name, part in zip(names, parts, strict=True)]
    if before.total is not None:
        p_values = [
            sequential.p_of_no_difference(gaps(part, after.of(name)))
            for name, part in zip(names, parts, strict=True)
        ]
    else:
        p_values = [
            paired.mcnemar(change.right_to_wrong, change.wrong_to_right) for change in changes
        ]
    return len(names), [
        SubjectDrift(
            subject=name,
            n=len(part.right),
            right_to_wrong=change.right_to_wrong,
            wrong_to_right=change.wrong_to_right,
            p_adjusted=p,
        )
        for name, part, change, p in zip(names, parts, changes, paired.holm(p_values), strict=True)
        if change.right_to_wrong or change.wrong_to_right
    ]


def _compared(measure: str, pairs: list[_Pair], scale: _Scale) -> list[Comparison]:
    """The pairs of one measure with their verdicts: they share one α."""
    p_values = paired.holm([pair.difference.p for pair in pairs])
    equivalences = paired.holm([pair.difference.p_equivalent or 0.0 for pair in pairs])
    found = []
    for pair, p, equivalence in zip(pairs, p_values, equivalences, strict=True):
        difference = pair.difference
        p_equivalent = None if difference.p_equivalent is None else equivalence
        said = verdict(difference.value, p, p_equivalent, scale.lower_is_better)
        more = None
        if said == "undecided":
            more = paired.items_to_decide(difference, scale.tested, len(pairs))
        count, changed = pair.subjects or (None, [])
        found.append(
            Comparison(
                measure=measure,
                text=pair.text,
                a=pair.a,
                b=pair.b,
                unit=scale.unit,
                drift=scale.show(difference.value),
                low=None if difference.low is None else scale.show(difference.low),
                high=None if difference.high is None else scale.show(difference.high),
                n=difference.n,
                of=pair.of,
                p=difference.p,
                p_adjusted=p,
                p_equivalent=p_equivalent,
                tolerance=scale.tolerance,
                verdict=said,
                more=more,
                flips=pair.flips,
                subjects=count,
                changed_subjects=changed,
            )
        )
    return found
