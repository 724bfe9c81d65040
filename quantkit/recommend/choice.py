"""Who is taken of those that meet every limit, and by what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from quantkit.recommend.candidates import Candidate
from quantkit.recommend.interval import Interval
from quantkit.recommend.limits import Check, Limit
from quantkit.recommend.nearness import Nearness

Reason = Literal["only", "throughput", "drift", "memory", "nothing"]
"""What decided: it alone meets all; it is faster than all others; of those as fast, it is nearer
to the reference than all others; of those as near, it takes the least memory; nothing did, and its
median is the highest."""


@dataclass(frozen=True)
class Assessed:
    """A candidate with its throughput at the load that counts, and its checks."""

    candidate: Candidate
    throughput: Interval | None
    checks: tuple[Check, ...]

    @classmethod
    def of(cls, candidate: Candidate, limits: Sequence[Limit], concurrency: int) -> Assessed:
        """Measure the candidate against each limit."""
        checks = tuple(limit.check(candidate) for limit in limits)
        return cls(candidate, candidate.throughput(concurrency), checks)

    @property
    def fits(self) -> bool:
        """Whether it can be ranked and meets every limit for sure."""
        return self.throughput is not None and all(one.state == "met" for one in self.checks)

    @property
    def open(self) -> tuple[Check, ...]:
        """Limits of which it is not known whether it meets them, if it fails none; else none."""
        if self.throughput is None or any(
            one.state in ("excluded", "unknown") for one in self.checks
        ):
            return ()
        return tuple(one for one in self.checks if one.state == "undecided")

    def with_limit(self, limit: Limit) -> Assessed:
        """The same, with the limit of that name in the place of the one that it has."""
        checks = [
            replace(one, limit=limit) if one.limit.name == limit.name else one
            for one in self.checks
        ]
        return replace(self, checks=tuple(checks))


@dataclass(frozen=True)
class Choice:
    """Who is taken, and ``tied``: who is not slower as far as the repetitions can tell."""

    pick: Assessed
    by: Reason
    tied: tuple[Assessed, ...]


@dataclass(frozen=True)
class Loosened:
    """The least change of one limit, the others as they are, that changes the pick."""

    limit: Limit
    """As it would have to be."""
    before: Limit
    pick: Assessed

    @property
    def share(self) -> float:
        """By which part of itself the bound moves."""
        bound = self.before.bound
        return abs(self.limit.bound - bound) / bound if bound else math.inf


def choose(assessed: Sequence[Assessed], nearness: Nearness) -> Choice | None:
    """The fastest of those that fit; where that is not known, the nearest; then the smallest."""
    fitting = [(one.throughput, one) for one in assessed if one.fits and one.throughput]
    if not fitting:
        return None
    top, _ = max(fitting, key=lambda pair: pair[0].value)
    fast = [one for throughput, one in fitting if throughput.overlaps(top)]
    near = [
        one
        for one in fast
        if not any(nearness.nearer(other.candidate.row, one.candidate.row) for other in fast)
    ]
    # Without paired tests 'nearer' may go round in a circle; then nobody is ahead.
    pick = min(near or fast, key=_memory)
    least = [one for one in near or fast if one.candidate.memory == pick.candidate.memory]
    by: Reason = "memory" if len(least) == 1 else "nothing"
    if len(fitting) == 1:
        by = "only"
    elif len(fast) == 1:
        by = "throughput"
    elif len(near) == 1:
        by = "drift"
    return Choice(pick, by, tuple(one for one in fast if one is not pick))


def loosened(
    assessed: Sequence[Assessed], limits: Sequence[Limit], nearness: Nearness
) -> list[Loosened]:
    """What the pick depends on, the limit that needs the least change first."""
    fitted = {one.candidate.key for one in assessed if one.fits}
    found = []
    for index, limit in enumerate(limits):
        needed = {one.checks[index].bound_to_meet for one in assessed}
        sign = -1 if limit.at_least else 1
        beyond = [one for one in needed if one is not None and sign * one > sign * limit.bound]
        for bound in sorted(beyond, key=lambda one: sign * one):
            moved = replace(limit, bound=_rounded(bound, sign))
            then = choose([one.with_limit(moved) for one in assessed], nearness)
            # Who met the limit before may come out on top too, where a newcomer shifts who is tied
            # with the fastest: that is not what the limit kept out.
            if then and then.pick.candidate.key not in fitted:
                found.append(Loosened(moved, limit, then.pick))
                break
    return sorted(found, key=lambda one: one.share)


def _rounded(bound: float, sign: int) -> float:
    """To three digits, away from the limit: what is shown suffices."""
    digits = 2 - math.floor(math.log10(abs(bound))) if bound else 0
    step = Fraction(10) ** digits
    return float(sign * math.ceil(sign * Fraction(bound) * step) / step)


def _memory(one: Assessed) -> tuple[float, float]:
    return one.candidate.memory.value, -(one.throughput.value if one.throughput else 0.0)
