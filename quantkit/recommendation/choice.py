"""Which of those that meet every limit is taken, and by what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from quantkit.ledger.load import Slo
from quantkit.recommendation.candidates import Candidate
from quantkit.recommendation.interval import Interval
from quantkit.recommendation.limits import Check, Limit, Profile
from quantkit.recommendation.nearness import Nearness

Reason = Literal["only", "memory", "throughput", "goodput", "drift", "nothing"]
"""What decided: it alone meets all limits; it needs less memory than all others; it is faster, or
serves more requests within the objective; it is nearer to the reference; nothing did, and its
median throughput is the highest."""
Criterion = Literal["memory", "throughput", "goodput", "drift"]
CRITERIA: dict[Profile, tuple[Criterion, ...]] = {
    "laptop": ("memory", "throughput", "drift"),
    "server": ("goodput", "throughput", "memory", "drift"),
    "quality": ("drift", "memory", "throughput"),
}
"""The criteria in their order: a later one decides among those that an earlier one cannot tell
apart."""
MEMORY_MARGIN = 0.05
"""Differences in memory of less than a twentieth decide nothing."""


@dataclass(frozen=True)
class Assessed:
    """A candidate with its throughput at the load that counts, and its checks."""

    candidate: Candidate
    throughput: Interval | None
    checks: tuple[Check, ...]
    goodput: Interval | None = None
    """Requests per second within the run's one objective; None where it has none, or several."""

    @classmethod
    def of(
        cls, candidate: Candidate, limits: Sequence[Limit], concurrency: int, slo: Slo | None
    ) -> Assessed:
        """Measure the candidate against each limit."""
        checks = tuple(limit.check(candidate) for limit in limits)
        goodput = candidate.goodput(slo) if slo else None
        return cls(candidate, candidate.throughput(concurrency), checks, goodput)

    @property
    def fits(self) -> bool:
        """Whether it can be ranked and meets every limit for sure."""
        return self.throughput is not None and all(one.state == "met" for one in self.checks)

    @property
    def open(self) -> tuple[Check, ...]:
        """Limits that it may or may not meet, if it fails none; else none."""
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
    """The candidate taken, what decided, and ``tied``: those that the earlier criteria could not
    tell from it."""

    pick: Assessed
    by: Reason
    tied: tuple[Assessed, ...] = ()
    before: tuple[Criterion, ...] = ()
    """What was asked before and did not decide."""

    @property
    def quantized(self) -> bool:
        """False: no quantized variant meets the limits."""
        return self.pick.candidate.quantized


@dataclass(frozen=True)
class Loosened:
    """The least change of one limit, the others as they are, that changes the pick."""

    limit: Limit
    """The bound as it would have to be."""
    before: Limit
    pick: Assessed

    @property
    def share(self) -> float:
        """The fraction of itself by which the bound moves."""
        bound = self.before.bound
        return abs(self.limit.bound - bound) / bound if bound else math.inf


def choose(assessed: Sequence[Assessed], nearness: Nearness, profile: Profile) -> Choice | None:
    """Choose by the profile's criteria in turn, among the quantized variants that meet every limit;
    where there are none, among the others."""
    fitting = [one for one in assessed if one.fits]
    left = [one for one in fitting if one.candidate.quantized] or fitting
    if len(left) < 2:
        return Choice(left[0], "only") if left else None
    before: list[Criterion] = []
    for criterion in CRITERIA[profile]:
        tied, left = left, _best(left, criterion, nearness)
        if len(left) == 1:
            others = tuple(one for one in tied if one is not left[0]) if before else ()
            return Choice(left[0], criterion, others, tuple(before))
        if criterion != "goodput" or all(one.goodput for one in left):
            before.append(criterion)
    pick = max(left, key=lambda one: one.throughput.value if one.throughput else 0.0)
    return Choice(pick, "nothing", tuple(o for o in left if o is not pick), tuple(before))


def _best(ones: list[Assessed], by: Criterion, nearness: Nearness) -> list[Assessed]:
    """Those that are not behind the first by this criterion, as far as the data tell."""
    if by == "memory":
        least = min(one.candidate.memory.value for one in ones)
        return [one for one in ones if one.candidate.memory.value <= least * (1 + MEMORY_MARGIN)]
    if by == "drift":
        near = [
            one
            for one in ones
            if not any(nearness.better(other.candidate.row, one.candidate.row) for other in ones)
        ]
        # Without paired tests 'nearer' may go round in a circle; then nobody is ahead.
        return near or ones
    rates = [one.goodput if by == "goodput" else one.throughput for one in ones]
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(ones):
        return ones
    top = max(known, key=lambda rate: rate.value)
    return [one for one, rate in zip(ones, known, strict=True) if rate.overlaps(top)]


def loosened(
    assessed: Sequence[Assessed], limits: Sequence[Limit], nearness: Nearness, profile: Profile
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
            then = choose([one.with_limit(moved) for one in assessed], nearness, profile)
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
