"""What the numbers can tell apart, and what they cannot.

Two values differ where their distance exceeds 1.96 standard errors of it (95 %). A ledger holds
the error of each value, not of the difference. All rows answer on the same tokens and questions,
so their errors mostly go together, and the error of a difference taken here is then too large:
the test misses differences. Against that, tokens of one text are not quite independent, and
nothing is corrected for the number of pairs: a result near the limit is weak evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.ledger import Bench, Metric, Row

Z95 = 1.959964
THROUGHPUT_MARGIN = 0.10
"""A bench is one run without an error of its own: below a tenth, differences are not ranked."""
CHANCE = {"mmlu_acc": 0.25}
"""What guessing scores, where the task fixes it: MMLU offers four answers."""


@dataclass(frozen=True)
class Served:
    """A row as one engine served it at one concurrency."""

    row: Row
    bench: Bench

    @property
    def engine(self) -> str:
        """The engine's name without its version."""
        return self.bench.engine.partition(" ")[0]


def comparable(a: Metric | None, b: Metric | None) -> bool:
    """Whether both exist, are finite, and were measured by the same protocol."""
    return (
        a is not None
        and b is not None
        and math.isfinite(a.value)
        and math.isfinite(b.value)
        and a.protocol == b.protocol
    )


def error_of_difference(a: Metric, b: Metric) -> float | None:
    """Standard error of ``a - b`` as if they were independent; None where either has none."""
    if a.stderr is None or b.stderr is None:
        return None
    error = math.hypot(a.stderr, b.stderr)
    return error if math.isfinite(error) else None


def differ(a: Metric, b: Metric) -> bool | None:
    """Whether ``a`` and ``b`` differ at 95 %; None where that cannot be said."""
    error = error_of_difference(a, b) if comparable(a, b) else None
    return None if error is None else abs(a.value - b.value) > Z95 * error


def tiers(metrics: Mapping[str, Metric]) -> list[list[str]]:
    """Ids from the lowest value up, in groups of which any two members of different ones differ.

    Within a group nothing is ranked: its members hang together by pairs that do not differ.
    Metrics without an error are left out.
    """
    ids = sorted(
        (id_ for id_, metric in metrics.items() if differ(metric, metric) is not None),
        key=lambda id_: metrics[id_].value,
    )
    groups: list[list[str]] = []
    for id_ in ids:
        group = [id_]
        # With unequal errors a far value can touch a group that a nearer one does not.
        while groups and any(
            not differ(metrics[a], metrics[b]) for earlier in groups for a in earlier for b in group
        ):
            group = groups.pop() + group
        groups.append(group)
    return groups


def fastest(served: Sequence[Served]) -> list[Served]:
    """Those within ``THROUGHPUT_MARGIN`` of the highest output throughput, highest first."""
    finite = [one for one in served if math.isfinite(one.bench.output_tokens_per_s)]
    ranked = sorted(finite, key=lambda one: -one.bench.output_tokens_per_s)
    limit = (1 - THROUGHPUT_MARGIN) * ranked[0].bench.output_tokens_per_s if ranked else 0.0
    return [one for one in ranked if one.bench.output_tokens_per_s >= limit]


def at_chance(name: str, metric: Metric) -> bool:
    """Whether an accuracy cannot be told from guessing."""
    if name not in CHANCE or metric.stderr is None:
        return False
    return abs(metric.value - CHANCE[name]) <= Z95 * metric.stderr
