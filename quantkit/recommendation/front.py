"""The Pareto front of drift against throughput: candidates that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from quantkit.ledger import Ledger
from quantkit.recommendation.candidates import Candidate, candidates
from quantkit.recommendation.interval import Interval
from quantkit.recommendation.nearness import Nearness

T = TypeVar("T")

Standing = Literal["front", "undecided", "dominated"]
"""On the front beyond doubt; it depends on differences inside the noise; beaten beyond doubt."""


@dataclass(frozen=True)
class Placed:
    """A candidate at one concurrency with both of its coordinates."""

    candidate: Candidate
    throughput: Interval
    divergence: Interval
    standing: Standing
    on_line: bool
    """Whether it is on the front by the bare values, the noise left aside."""
    beaten_by: tuple[Candidate, ...]
    """Who is faster and nearer, beyond doubt."""
    may_be_beaten_by: tuple[Candidate, ...]
    """Candidates that may be both: not surely slower, and not surely farther."""


def front(ledger: Ledger, concurrency: int) -> list[Placed]:
    """Everything that was served at this concurrency itself and whose divergence is known."""
    nearness = Nearness(ledger)
    found = []
    for one in candidates(ledger):
        speed, drift = one.throughput(concurrency), one.divergence
        here = any(bench.concurrency == concurrency for bench in one.benches)
        if here and speed and drift:
            found.append((one, speed, drift))
    line = on_front([(speed.value, drift.value) for _, speed, drift in found])

    def faster(a: int, b: int) -> bool:
        return found[a][1].low > found[b][1].high

    def nearer(a: int, b: int) -> bool:
        return nearness.nearer(found[a][0].row, found[b][0].row)

    def same_drift(a: int, b: int) -> bool:
        return found[a][0].row.id == found[b][0].row.id

    indices = range(len(found))
    placed = []
    for b, (candidate, speed, drift) in enumerate(found):
        others = [a for a in indices if a != b]
        beaten = [a for a in others if faster(a, b) and (nearer(a, b) or same_drift(a, b))]
        open_ = [a for a in others if a not in beaten and not faster(b, a) and not nearer(b, a)]
        standing: Standing = "dominated" if beaten else "undecided" if open_ else "front"
        placed.append(
            Placed(
                candidate, speed, drift, standing, line[b],
                tuple(found[a][0] for a in beaten), tuple(found[a][0] for a in open_),
            )
        )  # fmt: skip
    return placed


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of points (more is better, less is better): whether no other is as good in both and better
    in one. One pass from the fastest down: a point must be lower than all that are faster."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    found = [False] * len(points)
    lowest, at = float("inf"), float("inf")
    for i in order:
        speed, drift = points[i]
        if drift < lowest or (drift == lowest and speed == at):
            found[i], lowest, at = True, drift, speed
    return found
