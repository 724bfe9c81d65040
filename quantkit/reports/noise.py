"""What the data can tell apart, and what they cannot.

Whether two rows differ was tested on their windows and questions in pairs when the ledger was
written (``quantkit.evaluation.compare``); here it is looked up. Throughputs have intervals instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.evaluation import paired
from quantkit.evaluation.compare import groups
from quantkit.ledger import REFERENCE, Ledger, Metric, Row
from quantkit.ledger.drift import Comparison
from quantkit.ledger.load import Bench
from quantkit.recommendation.candidates import throughput
from quantkit.recommendation.interval import Interval
from quantkit.recommendation.nearness import Nearness, divergence

Z95 = 1.959964
CHANCE = {"mmlu_acc": 0.25}
"""What guessing scores, where the task fixes it: MMLU offers four answers."""


@dataclass(frozen=True)
class Served:
    """A row as one engine served it at one concurrency."""

    row: Row
    bench: Bench

    @property
    def engine(self) -> str:
        """The engine's name and options, without its version."""
        return self.bench.engine.id

    @property
    def throughput(self) -> Interval:
        """Output tokens per second over the repetitions."""
        return throughput(self.bench)


def comparable(a: Metric | None, b: Metric | None) -> bool:
    """Whether both exist, are finite, and were measured by the same protocol."""
    return (
        a is not None
        and b is not None
        and math.isfinite(a.value)
        and math.isfinite(b.value)
        and a.protocol == b.protocol
    )


def against_reference(
    ledger: Ledger, row: Row, measure: str, text: str | None = None
) -> Comparison | None:
    """The row against the reference; None where the two were not or may not be compared."""
    if not comparable(row.metric(measure, text), ledger.reference.metric(measure, text)):
        return None
    wanted = (measure, text, REFERENCE, row.id)
    return next((c for c in ledger.comparisons if (c.measure, c.text, c.a, c.b) == wanted), None)


def tiers(ledger: Ledger, measure: str, text: str | None = None) -> list[list[str]]:
    """``compare.groups`` of the rows that may be compared with the first that was compared."""
    compared = [one for one in ledger.comparisons if (one.measure, one.text) == (measure, text)]
    known = {id_ for one in compared for id_ in (one.a, one.b)}
    metrics = {
        row.id: metric
        for row in ledger.variants
        if row.id in known and (metric := row.metric(measure, text))
    }
    first = next((m for m in metrics.values() if math.isfinite(m.value)), None)
    like_it = {id_: metric for id_, metric in metrics.items() if comparable(metric, first)}
    return groups(measure, text, like_it, ledger.comparisons)


def nearest_on_worst_text(ledger: Ledger) -> list[list[str]]:
    """Ids of the variants by their divergence on the worst text, in groups that are told apart."""
    nearness = Nearness(ledger)
    rows = {row.id: row for row in ledger.variants[1:]}
    drifts = {id_: drift.value for id_, row in rows.items() if (drift := divergence(row))}

    def apart(a: str, b: str) -> bool:
        one, other = rows[a], rows[b]
        return nearness.nearer(one, other) or nearness.nearer(other, one)

    return paired.groups(sorted(drifts, key=drifts.__getitem__), apart)


@dataclass(frozen=True)
class AgainstFloor:
    """A variant's drift as a multiple of what happens to the source unquantized: on the engine that
    serves the variant, or in other batches, whichever is more.

    ``kld``: of the divergences, None where the engine does not give them. ``loss``: of the loss in
    nats per token, against the largest that the data allow for the source. 1 and less is no more
    than noise.
    """

    kld: float | None
    loss: float

    @property
    def below(self) -> tuple[str, ...]:
        """What does not rise above the floor."""
        shares = {"KL divergence": self.kld, "perplexity": self.loss}
        return tuple(name for name, share in shares.items() if share is not None and share <= 1)


def against_floor(ledger: Ledger, row: Row) -> AgainstFloor | None:
    """None where the loss was not split, or no floor of its protocol was measured for it."""
    loss = row.loss
    if loss is None:
        return None
    floors = [
        floor
        for floor in ledger.noise_floor
        if floor.protocol == loss.protocol
        and (floor.batch > 1 or floor.engine == loss.serving_engine)
    ]
    if not floors:
        return None
    limit = max(abs(floor.nll.value) + Z95 * (floor.nll.stderr or 0.0) for floor in floors)
    measured = loss.kld if loss.serving_engine else loss.kld_quantization
    klds = [floor.kld.value for floor in floors if floor.kld is not None]
    kld = _share(measured.value, max(klds)) if measured is not None and klds else None
    return AgainstFloor(kld, _share(abs(loss.total.value), limit))


def _share(value: float, floor: float) -> float:
    return value / floor if floor > 0 else math.inf if value > 0 else 0.0


def fastest(served: Sequence[Served]) -> list[Served]:
    """Rows whose throughput the repetitions cannot tell from the highest, highest first."""
    finite = [one for one in served if one.throughput.finite]
    ranked = sorted(finite, key=lambda one: -one.throughput.value)
    return [one for one in ranked if one.throughput.overlaps(ranked[0].throughput)]


def at_chance(name: str, metric: Metric) -> bool:
    """Whether an accuracy cannot be told from guessing."""
    if name not in CHANCE or metric.stderr is None:
        return False
    return abs(metric.value - CHANCE[name]) <= Z95 * metric.stderr
