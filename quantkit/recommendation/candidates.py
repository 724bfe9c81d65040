"""What can be shipped: each whole row of a ledger on each engine that served it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from quantkit.ledger import REFERENCE, Ledger, Row
from quantkit.ledger.load import Bench, Delivered, Goodput, Slo
from quantkit.models.engine_config import EngineConfig
from quantkit.recommendation.interval import Interval, of_repetitions
from quantkit.recommendation.nearness import Drift, divergence, worst_text

T = TypeVar("T", Bench, Goodput)
_UNQUANTIZED = re.compile(r"(gguf|safetensors):(f32|f16|bf16)", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """A row as one engine serves it; ``benches`` in the order of their concurrency."""

    row: Row
    config: EngineConfig
    benches: tuple[Bench, ...]
    goodputs: tuple[Goodput, ...] = ()
    levels_off: bool = False
    """Whether its sweep ended where more requests at a time brought no more tokens."""
    drift: Drift = "worst"

    @property
    def engine(self) -> str:
        """Its name and options, without the version."""
        return self.config.id

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all others."""
        return self.row.id, self.engine

    @property
    def quantized(self) -> bool:
        """Whether its weights are not the source's own, in whatever format."""
        return not _UNQUANTIZED.fullmatch(self.row.spec)

    @property
    def judged(self) -> bool:
        """Whether anything is known of what it loses as it is served: with this KV cache."""
        measured = {metric.engine.kv_cache for _, _, metric in self.row.all_metrics}
        if self.row.id == REFERENCE:
            measured.add(None)
        return self.config.kv_cache in measured

    @property
    def memory(self) -> Interval:
        """Peak of the server in bytes, at all loads of its bench."""
        return Interval.exactly(max(bench.peak_rss_bytes for bench in self.benches))

    @property
    def divergence(self) -> Interval | None:
        """KL divergence from the reference, nats, over the texts as ``drift`` says; None where it
        was not measured."""
        return divergence(self.row, self.drift)

    @property
    def worst_text(self) -> str | None:
        """The one of several texts that ``divergence`` is of."""
        several = self.drift == "worst" and len(self.row.texts) > 1
        return worst_text(self.row.texts) if several and self.row.id != REFERENCE else None

    def bench(self, concurrency: int) -> Bench | None:
        """At this concurrency, or where its sweep levelled off before."""
        below = [bench for bench in self.benches if bench.concurrency <= concurrency]
        if not below or (below[-1].concurrency < concurrency and not self.levels_off):
            return None
        return below[-1]

    def throughput(self, concurrency: int) -> Interval | None:
        """Output tokens per second; None where that was not measured."""
        bench = self.bench(concurrency)
        return throughput(bench) if bench else None

    def latency(self, concurrency: int, name: str) -> Interval | None:
        """95th percentile of ``ttft_ms`` or ``itl_ms`` over requests."""
        bench = self.bench(concurrency)
        if bench is None:
            return None
        return of_repetitions([getattr(reading, name).p95 for reading in bench.repetitions])

    def goodput(self, slo: Slo) -> Interval | None:
        """Requests per second that meet the objective; its end is the lowest rate that did not.

        As searched for in the bench; for an objective that was not, as the closed loops show it:
        what was completed at the highest concurrency whose 95th percentiles both meet it.
        """
        for found in self.goodputs:
            if found.slo == slo:
                above = math.inf if found.above_per_s is None else found.above_per_s
                return Interval(found.rate_per_s, found.rate_per_s, above)
        return self._goodput_of_loops(slo)

    def _goodput_of_loops(self, slo: Slo) -> Interval | None:
        if slo.share != 0.95:
            return None
        reached, above = 0.0, math.inf
        for bench in self.benches:
            if not slo.met_by(bench.ttft_ms.p95, bench.itl_ms.p95):
                above = max(reached, bench.request_per_s)
                break
            reached = max(reached, bench.request_per_s)
        return Interval(reached, reached, above)


def throughput(bench: Delivered) -> Interval:
    """Output tokens per second over the repetitions of a load."""
    return of_repetitions([reading.output_tokens_per_s for reading in bench.repetitions])


def candidates(ledger: Ledger, drift: Drift = "worst") -> list[Candidate]:
    """Each whole row on each engine that served it, the reference among them.

    A row whose bench failed is whole: what was measured before counts, on each engine.
    """
    return [
        Candidate(
            row,
            next(bench.engine for bench in row.bench if name_of(bench) == engine),
            tuple(sorted(_of(engine, row.bench), key=lambda bench: bench.concurrency)),
            tuple(_of(engine, row.goodput)),
            _swept(ledger) and row.failed is None,
            drift,
        )
        for row in ledger.variants
        if row.failed is None or row.failed.stage == "bench"
        for engine in sorted({name_of(bench) for bench in row.bench if _finite(bench)})
    ]


def name_of(measured: Bench | Goodput) -> str:
    """The engine and its options, without its version."""
    return measured.engine.id


def _of(engine: str, measured: Sequence[T]) -> list[T]:
    return [one for one in measured if name_of(one) == engine]


def _finite(bench: Bench) -> bool:
    return all(math.isfinite(one.output_tokens_per_s) for one in bench.repetitions)


def _swept(ledger: Ledger) -> bool:
    bench = ledger.recipe.get("bench")
    return isinstance(bench, dict) and bench.get("concurrency") == "auto"
