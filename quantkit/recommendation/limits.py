"""What a variant must not exceed or fall short of, and whether it does, as far as is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from quantkit.errors import RecipeError
from quantkit.ledger import REFERENCE, Ledger, is_accuracy
from quantkit.ledger.load import Goodput, Slo
from quantkit.recommendation.candidates import Candidate
from quantkit.recommendation.interval import Interval
from quantkit.recommendation.nearness import Drift

Profile = Literal["laptop", "server", "quality"]
"""What comes first: little memory, much throughput, or little drift."""
ACCEPTED: dict[Profile, float] = {"laptop": 10.0, "server": 5.0, "quality": 1.0}
"""How many times the tolerance a variant may lose where no limit on quality is given. The
tolerance, in percent of perplexity, is the run's own: what counts as equal."""

DEFAULT_TOLERANCE = 1.0
"""The tolerance in percent, as in recipes, where the ledger has no tested pair."""

State = Literal["met", "excluded", "undecided", "unknown"]


@dataclass(frozen=True)
class Wants:
    """What is asked of the variant to ship; None where it does not matter.

    ``max_memory`` in bytes, ``max_kld`` in nats per token, ``max_drop`` in points of accuracy,
    ``min_goodput`` in requests per second at ``slo``, which is the ledger's where None.
    """

    max_memory: int | None = None
    max_kld: float | None = None
    max_drop: float | None = None
    min_goodput: float | None = None
    slo: Slo | None = None
    concurrency: int | None = None
    engine: str | None = None
    profile: Profile | None = None
    """None: ``laptop`` for what was measured without a GPU, else ``server``."""
    drift: Drift = "worst"
    """Which text ``max_kld`` applies to, where there are several."""


@dataclass(frozen=True)
class Limit:
    """One bound on one measured quantity."""

    name: str
    """The option's name, such as ``max-kld``; where there are several, with what each is of."""
    quantity: str
    """What is bound, in words: ``KL divergence``."""
    unit: Literal["bytes", "nats", "points", "requests/s", "ms"]
    bound: float
    measure: Callable[[Candidate], Interval | None]
    at_least: bool = False
    """Whether more is better; else the bound is an upper one."""
    is_default: bool = False
    over: str = ""
    """Which of several texts it is about: ``on the worst text``."""
    text: Callable[[Candidate], str | None] = lambda _: None
    """Which that is, of a candidate."""
    because: str = ""
    """Where a default comes from."""

    @property
    def said(self) -> str:
        """What is bound, and on which text."""
        return f"{self.quantity} {self.over}".strip()

    def check(self, candidate: Candidate) -> Check:
        """Where the candidate stands."""
        return Check(self, self.measure(candidate), self.text(candidate))


@dataclass(frozen=True)
class Check:
    """A candidate's value beside the limit; None where it was not measured."""

    limit: Limit
    measured: Interval | None
    text: str | None = None
    """The one that was the worst, where that is what counts."""

    @property
    def said(self) -> str:
        """What was measured, by the name of its text."""
        return self.limit.said if self.text is None else f"{self.limit.quantity} on {self.text}"

    @property
    def state(self) -> State:
        """Undecided where the bound lies inside the interval."""
        if self.measured is None:
            return "unknown"
        bound = self.limit.bound
        if self.limit.at_least:
            if self.measured.low >= bound:
                return "met"
            return "excluded" if self.measured.high < bound else "undecided"
        if self.measured.high <= bound:
            return "met"
        return "excluded" if self.measured.low > bound else "undecided"

    @property
    def bound_to_meet(self) -> float | None:
        """The bound with which this candidate would surely meet the limit."""
        if self.measured is None:
            return None
        bound = self.measured.low if self.limit.at_least else self.measured.high
        return bound if math.isfinite(bound) else None


def limits(ledger: Ledger, wants: Wants, profile: Profile, concurrency: int) -> list[Limit]:
    """Every bound that ``wants`` sets, and the profile's own where none is on quality.

    Raise RecipeError for one on something that no row of the ledger has.
    """
    found = []
    if wants.max_memory is not None:
        found.append(
            Limit("max-memory", "memory", "bytes", wants.max_memory, lambda one: one.memory)
        )
    found += _quality(ledger, wants, profile)
    if wants.min_goodput is not None:
        slo = wants.slo or _slo_of(ledger)
        found.append(
            Limit(
                "min-goodput", f"goodput at {said(slo)}", "requests/s", wants.min_goodput,
                lambda one: one.goodput(slo), at_least=True,
            )
        )  # fmt: skip
    elif wants.slo is not None:
        found += _latencies(wants.slo, concurrency)
    return found


def said(slo: Slo) -> str:
    """``TTFT ≤ 500 ms, ITL ≤ 50 ms``."""
    given = (("TTFT", slo.ttft_ms), ("ITL", slo.itl_ms))
    return ", ".join(f"{name} ≤ {value:g} ms" for name, value in given if value is not None)


def _quality(ledger: Ledger, wants: Wants, profile: Profile) -> list[Limit]:
    found = []
    has_divergence = any(row.by_text("kld_mean") for row in ledger.variants[1:])
    bound, because = wants.max_kld, ""
    if bound is None and wants.max_drop is None and has_divergence:
        percent = ACCEPTED[profile] * _tolerance(ledger)
        # On text that the reference itself would write, D nats raise perplexity by exp(D).
        bound, because = math.log1p(percent / 100), f"{percent:g} % more perplexity"
    if bound is not None:
        if not has_divergence:
            raise RecipeError("max-kld: this run measured no KL divergence; it needs a text")
        kld = Limit(
            "max-kld",
            "KL divergence",
            "nats",
            bound,
            lambda one: one.divergence,
            is_default=wants.max_kld is None,
            because=because,
            text=lambda one: one.worst_text,
        )
        over = {"worst": "on the worst text", "mean": "on average over the texts"}[wants.drift]
        found.append(replace(kld, over=over) if len(ledger.texts) > 1 else kld)
    if wants.max_drop is not None:
        names = {name for row in ledger.variants for name in row.metrics if is_accuracy(name)}
        if not names:
            raise RecipeError("max-drop: this run asked no questions; it needs evaluate.tasks")
        found += [_drop(ledger, name, wants.max_drop) for name in sorted(names)]
    return found


def _tolerance(ledger: Ledger) -> float:
    """The tolerance of perplexity, in percent, with which the run's pairs were tested."""
    found = [one.tolerance for one in ledger.comparisons if one.measure == "ppl" and one.tolerance]
    return found[0] if found else DEFAULT_TOLERANCE


def _drop(ledger: Ledger, measure: str, points: float) -> Limit:
    pairs = {
        one.b: one
        for one in ledger.comparisons
        if one.measure == measure and one.a == REFERENCE and one.low is not None
    }

    def lost(candidate: Candidate) -> Interval | None:
        """Points below the reference, with the interval of the paired test."""
        if candidate.row.id == REFERENCE:
            return Interval.exactly(0.0)
        one = pairs.get(candidate.row.id)
        if one is None or one.low is None or one.high is None:
            return None
        return Interval(0.0 - one.drift, 0.0 - one.high, 0.0 - one.low)

    task = measure.removesuffix("_acc")
    return Limit(f"max-drop ({task})", f"drop in {task}", "points", points, lost)


def _latencies(slo: Slo, concurrency: int) -> list[Limit]:
    given = (("ttft_ms", "TTFT p95", slo.ttft_ms), ("itl_ms", "ITL p95", slo.itl_ms))
    return [
        Limit(f"slo ({name})", title, "ms", bound, _latency(concurrency, name))
        for name, title, bound in given
        if bound is not None
    ]


def _latency(concurrency: int, name: str) -> Callable[[Candidate], Interval | None]:
    return lambda candidate: candidate.latency(concurrency, name)


def objectives(goodputs: Iterable[Goodput]) -> list[Slo]:
    """Those that were searched for, each once."""
    return list({one.slo.model_dump_json(): one.slo for one in goodputs}.values())


def _slo_of(ledger: Ledger) -> Slo:
    found = objectives(one for row in ledger.variants for one in row.goodput)
    if len(found) != 1:
        raise RecipeError(
            "min-goodput: name the objective, with --slo ttft_ms=500,itl_ms=50: "
            f"this run has {len(found) or 'none'}"
        )
    return found[0]
