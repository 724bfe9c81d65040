"""What to ship: the variant and engine that a ledger speaks for, and what it cannot decide.

The rule. Of all whole variants, the reference among them, on every engine that served them: those
that meet every limit beyond the noise; of these the one with the most output tokens per second at
the highest concurrency; of several that the repetitions cannot tell apart there, the one nearest to
the reference; of several that the windows of text cannot tell apart, the one that takes the least
memory. Of several texts, a variant counts by the one on which it drifted most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from quantkit.errors import EvaluationError, RecipeError, did_you_mean
from quantkit.ledger import REFERENCE, Ledger
from quantkit.recommend.candidates import Candidate, candidates
from quantkit.recommend.choice import Assessed, Choice, Loosened, Reason, choose, loosened
from quantkit.recommend.interval import Interval
from quantkit.recommend.limits import MAX_KLD, Check, Limit, Wants, limits, said
from quantkit.recommend.nearness import Drift, Nearness

__all__ = [
    "MAX_KLD", "Assessed", "Candidate", "Check", "Drift", "Interval", "Limit", "Loosened",
    "Missing", "Nearness", "Reason", "Recommendation", "Wants", "by_default", "candidates",
    "recommend", "said",
]  # fmt: skip


@dataclass(frozen=True)
class Missing:
    """A row that could not be considered, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Recommendation:
    """What to ship under ``limits``, at ``concurrency`` requests at a time."""

    concurrency: int
    limits: tuple[Limit, ...]
    assessed: tuple[Assessed, ...]
    """Everything that was served, in the ledger's order."""
    choice: Choice | None
    """None where nothing meets every limit for sure."""
    runner_up: Assessed | None
    """Who would be taken if the pick did not exist."""
    loosened: tuple[Loosened, ...]
    open: tuple[Assessed, ...]
    """Those that would be taken if the limits that are undecided for them turned out to be met."""
    missing: tuple[Missing, ...]
    nearness: Nearness
    drift: Drift
    """By what of several texts a variant counts."""

    @property
    def pick(self) -> Assessed | None:
        """What to ship."""
        return self.choice.pick if self.choice else None


def recommend(ledger: Ledger, wants: Wants | None = None) -> Recommendation:
    """Apply the rule to a ledger.

    Raise EvaluationError where nothing was served in a bench, or of no variant's quality anything
    is known; RecipeError for limits on what the run did not measure.
    """
    wants = wants or Wants()
    served = candidates(ledger, wants.drift)
    if not served:
        raise EvaluationError("nothing to recommend: no whole variant of this run was benched")
    served = [one for one in served if one.judged]
    if all(one.row.id == REFERENCE for one in served) and len(ledger.variants) > 1:
        raise EvaluationError(
            "nothing to recommend: what the variants lost was not measured; give the run `evaluate`"
        )
    served = _on_engine(served, wants.engine)
    concurrency = _concurrency(served, wants.concurrency)
    bounds = limits(ledger, wants, concurrency)
    assessed = [Assessed.of(one, bounds, concurrency) for one in served]
    nearness = Nearness(ledger, wants.drift)
    choice = choose(assessed, nearness)
    others = [one for one in assessed if not choice or one is not choice.pick]
    second = choose(others, nearness)
    return Recommendation(
        concurrency=concurrency,
        limits=tuple(bounds),
        assessed=tuple(assessed),
        choice=choice,
        runner_up=second.pick if second else None,
        loosened=tuple(loosened(assessed, bounds, nearness)),
        open=tuple(_open(assessed, nearness)),
        missing=tuple(_missing(ledger, assessed, concurrency)),
        nearness=nearness,
        drift=wants.drift,
    )


def by_default(ledger: Ledger) -> Recommendation | None:
    """Under no limit but the default one on drift; None where nothing can be recommended."""
    try:
        return recommend(ledger)
    except EvaluationError:
        return None


def _on_engine(served: list[Candidate], engine: str | None) -> list[Candidate]:
    names = sorted({one.engine for one in served})
    if engine is not None and engine not in names:
        raise RecipeError(
            f"engine {engine!r}: this run benched {', '.join(names)}{did_you_mean(engine, names)}"
        )
    return [one for one in served if engine in (None, one.engine)]


def _concurrency(served: Sequence[Candidate], wanted: int | None) -> int:
    levels = sorted({bench.concurrency for one in served for bench in one.benches})
    if wanted is None:
        return levels[-1]
    if wanted not in levels:
        raise RecipeError(
            f"concurrency {wanted}: this run benched {', '.join(map(str, levels))} requests at a "
            "time"
        )
    return wanted


def _open(assessed: Sequence[Assessed], nearness: Nearness) -> list[Assessed]:
    """Each taken as meeting what is undecided for it, the others as they are."""
    found = []
    for one in assessed:
        if not one.open:
            continue
        then = choose(
            [replace(one, checks=()) if other is one else other for other in assessed], nearness
        )
        if then and then.pick.candidate is one.candidate:
            found.append(one)
    return found


def _missing(ledger: Ledger, assessed: Sequence[Assessed], concurrency: int) -> list[Missing]:
    known = {one.candidate.row.id for one in assessed}
    found = []
    for row in ledger.variants:
        if row.failed and row.id in known:
            found.append(Missing(row.id, "failed in its bench; what was measured before counts"))
        elif row.failed:
            found.append(Missing(row.id, f"failed in {row.failed.stage}"))
        elif not row.bench:
            found.append(Missing(row.id, "was not benched"))
        elif row.id != REFERENCE and not (row.texts or row.metrics):
            found.append(Missing(row.id, "what it lost was not measured"))
        elif row.id not in known:
            found.append(Missing(row.id, "was not benched on this engine"))
    for one in assessed:
        lacking = [f"no {check.limit.said}" for check in one.checks if check.measured is None]
        if one.throughput is None:
            lacking.insert(0, f"no bench at {concurrency} requests at a time")
        if lacking:
            found.append(
                Missing(f"{one.candidate.row.id} on {one.candidate.engine}", ", ".join(lacking))
            )
    return found
