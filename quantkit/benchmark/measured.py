"""What a bench hands back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from quantkit.errors import EngineError
from quantkit.ledger import Sample
from quantkit.ledger.load import Bench, Goodput, RateBench
from quantkit.system.table import Table, Tabular


@dataclass(frozen=True)
class BenchResult:
    """What the ledger keeps, and what the server wrote before the load.

    ``error``: why it is not all that was asked for.
    """

    benches: list[Bench] = field(default_factory=list)
    rates: list[RateBench] = field(default_factory=list)
    goodput: list[Goodput] = field(default_factory=list)
    sample: Sample | None = None
    error: str | None = None


class Incomplete(EngineError):
    """Something was measured, and then came an error; ``result`` holds both."""

    def __init__(self, result: BenchResult) -> None:
        super().__init__(result.error or "")
        self.result = result


def together(found: Sequence[BenchResult]) -> BenchResult:
    """The results of several engines as one; the first sample and the first error."""
    return BenchResult(
        [one for result in found for one in result.benches],
        [one for result in found for one in result.rates],
        [one for result in found for one in result.goodput],
        next((result.sample for result in found if result.sample), None),
        next((result.error for result in found if result.error), None),
    )


class Benched(Tabular, dict[str, BenchResult]):
    """What each model delivered, by its name."""

    def table(self) -> Table:
        """One row a load: medians over the repetitions."""
        return Table.of_records(
            [
                {
                    "variant": name,
                    "engine": str(one.engine),
                    "concurrency": one.concurrency if isinstance(one, Bench) else None,
                    "rate_per_s": one.rate_per_s if isinstance(one, RateBench) else None,
                    "output_tokens_per_s": one.output_tokens_per_s,
                    "request_per_s": one.request_per_s,
                    "ttft_ms_p50": one.ttft_ms.p50,
                    "ttft_ms_p95": one.ttft_ms.p95,
                    "itl_ms_p50": one.itl_ms.p50,
                    "itl_ms_p95": one.itl_ms.p95,
                    "peak_rss_bytes": one.peak_rss_bytes,
                    "errors": one.errors,
                }
                for name, found in self.items()
                for one in (*found.benches, *found.rates)
            ]
        )
