"""What to ship: the variant and engine that a ledger speaks for, and what it cannot decide.

The rule. Of all whole quantized variants, on every engine that served them, those that meet every
limit beyond the noise; of these the best by what the profile puts first: the least memory on a
laptop, the most goodput or throughput on a server, the least drift where quality is all. What the
data cannot tell apart is decided by what comes next (``choice.CRITERIA``). The reference is taken
only where no quantized variant meets the limits. Of several texts, a variant counts by the one on
which it drifted most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from quantkit.errors import EvaluationError, RecipeError, did_you_mean
from quantkit.ledger import REFERENCE, Ledger
from quantkit.ledger.load import Slo
from quantkit.models.engine_config import EngineConfig
from quantkit.recommendation.candidates import Candidate, candidates
from quantkit.recommendation.choice import Assessed, Choice, Loosened, Reason, choose, loosened
from quantkit.recommendation.interval import Interval
from quantkit.recommendation.limits import (
    ACCEPTED,
    Check,
    Limit,
    Profile,
    Wants,
    limits,
    objectives,
    said,
)
from quantkit.recommendation.nearness import Drift, Nearness
from quantkit.system.table import Cell, Table, Tabular

__all__ = [
    "ACCEPTED", "PROFILES", "Assessed", "Candidate", "Check", "Drift", "Interval", "Limit",
    "Loosened", "Missing", "Nearness", "Profile", "Reason", "Recommendation", "Wants", "by_default",
    "candidates", "profiles", "recommend", "said",
]  # fmt: skip

PROFILES: tuple[Profile, ...] = get_args(Profile)


@dataclass(frozen=True)
class Missing:
    """A row that could not be considered, and why."""

    id: str
    reason: str


@dataclass(frozen=True, repr=False)
class Recommendation(Tabular):
    """What to ship under ``limits``, at ``concurrency`` requests at a time."""

    profile: Profile
    concurrency: int
    limits: tuple[Limit, ...]
    assessed: tuple[Assessed, ...]
    """Everything that was served, in the ledger's order."""
    choice: Choice | None
    """None where nothing meets every limit for sure."""
    runner_up: Assessed | None
    """The candidate that would be taken if the pick did not exist."""
    loosened: tuple[Loosened, ...]
    open: tuple[Assessed, ...]
    """Those that would be taken if the limits that are undecided for them turned out to be met."""
    missing: tuple[Missing, ...]
    nearness: Nearness
    drift: Drift
    """Which of several texts a variant counts by."""

    @property
    def pick(self) -> Assessed | None:
        """What to ship."""
        return self.choice.pick if self.choice else None

    def table(self) -> Table:
        """One row for each that was served: the pick first."""
        rest = [one for one in self.assessed if one is not self.pick]
        ordered = [self.pick, *rest] if self.pick else rest
        return Table.of_records([self._record(one) for one in ordered])

    def _record(self, one: Assessed) -> dict[str, Cell]:
        candidate = one.candidate
        throughput, drift = candidate.throughput(self.concurrency), candidate.divergence
        return {
            "": "ship" if one is self.pick else "next" if one is self.runner_up else "",
            "variant": candidate.row.id,
            "engine": candidate.engine,
            "memory_bytes": candidate.memory.value,
            "kld_mean": drift.value if drift else None,
            f"output_tokens_per_s @{self.concurrency}": throughput.value if throughput else None,
        }


def recommend(ledger: Ledger, wants: Wants | None = None) -> Recommendation:
    """Apply the rule to a ledger.

    Raise EvaluationError where nothing was served in a bench, or of no variant's quality anything
    is known; RecipeError for limits on what the run did not measure.
    """
    wants = wants or Wants()
    served = candidates(ledger, wants.drift)
    if not served:
        raise EvaluationError("nothing to recommend: no whole variant of this run was benched")
    unjudged = [one for one in served if not one.judged and any(one.row.all_metrics)]
    served = [one for one in served if one.judged]
    if all(one.row.id == REFERENCE for one in served) and len(ledger.variants) > 1:
        raise EvaluationError(
            "nothing to recommend: what the variants lost was not measured; give the run `evaluate`"
        )
    served = _on_engine(served, wants.engine)
    profile = wants.profile or ("server" if ledger.environment.gpu else "laptop")
    concurrency = _concurrency(served, wants.concurrency, profile)
    bounds = limits(ledger, wants, profile, concurrency)
    slo = _objective(served)
    assessed = [Assessed.of(one, bounds, concurrency, slo) for one in served]
    nearness = Nearness(ledger, wants.drift)
    choice = choose(assessed, nearness, profile)
    others = [one for one in assessed if not choice or one is not choice.pick]
    second = choose(others, nearness, profile)
    if choice and second and choice.quantized and not second.quantized:
        second = None
    return Recommendation(
        profile=profile,
        concurrency=concurrency,
        limits=tuple(bounds),
        assessed=tuple(assessed),
        choice=choice,
        runner_up=second.pick if second else None,
        loosened=tuple(loosened(assessed, bounds, nearness, profile)),
        open=tuple(_open(assessed, nearness, profile)),
        missing=(*_missing(ledger, assessed, concurrency), *map(_other_cache, unjudged)),
        nearness=nearness,
        drift=wants.drift,
    )


def profiles(ledger: Ledger, wants: Wants | None = None) -> list[Recommendation]:
    """For each profile, with these limits; as ``recommend``."""
    return [recommend(ledger, replace(wants or Wants(), profile=one)) for one in PROFILES]


def by_default(ledger: Ledger) -> Recommendation | None:
    """The recommendation under the default limit on drift alone; None where there is none."""
    try:
        return recommend(ledger)
    except EvaluationError:
        return None


def _on_engine(served: list[Candidate], engine: str | None) -> list[Candidate]:
    names = sorted({one.engine for one in served})
    if engine is not None and ":" in engine:
        engine = EngineConfig.parse(engine).id
    if engine is not None and engine not in names:
        raise RecipeError(
            f"engine {engine!r}: this run benched {', '.join(names)}{did_you_mean(engine, names)}"
        )
    return [one for one in served if engine in (None, one.engine)]


def _objective(served: Sequence[Candidate]) -> Slo | None:
    """The one that goodput was searched for."""
    found = objectives(good for one in served for good in one.goodputs)
    return found[0] if len(found) == 1 else None


def _concurrency(served: Sequence[Candidate], wanted: int | None, profile: Profile) -> int:
    """The highest level of the run; on a laptop the lowest: one person asks there."""
    levels = sorted({bench.concurrency for one in served for bench in one.benches})
    if wanted is None:
        return levels[0 if profile == "laptop" else -1]
    if wanted not in levels:
        raise RecipeError(
            f"concurrency {wanted}: this run benched {', '.join(map(str, levels))} requests at a "
            "time"
        )
    return wanted


def _open(assessed: Sequence[Assessed], nearness: Nearness, profile: Profile) -> list[Assessed]:
    """Candidates that would each be the pick if they met the limits that are undecided for them."""
    found = []
    for one in assessed:
        if not one.open:
            continue
        then = choose(
            [replace(one, checks=()) if other is one else other for other in assessed],
            nearness,
            profile,
        )
        if then and then.pick.candidate is one.candidate:
            found.append(one)
    return found


def _other_cache(one: Candidate) -> Missing:
    return Missing(
        f"{one.row.id} on {one.engine}",
        "what it loses with this KV cache was not measured; give `evaluate.engine` the same",
    )


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
