"""Print what engines delivered under load: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

from quantkit.cli.console import print_json, print_table
from quantkit.ledger.load import Bench, Delivered, RateBench

if TYPE_CHECKING:
    from quantkit.benchmark.measured import BenchResult

_COLUMNS = (
    "model", "engine", "load", "tok/s", "range", "req/s", "TTFT p50 ms", "p95", "ITL p50 ms", "p95",
    "of bandwidth", "errors",
)  # fmt: skip


def results(measured: Mapping[str, BenchResult], as_json: bool) -> None:
    """One line a model, engine and load; then each goodput, and what is to be known of them."""
    if as_json:
        print_json(
            {
                name: {
                    "bench": [one.model_dump(mode="json") for one in found.benches],
                    "rates": [one.model_dump(mode="json") for one in found.rates],
                    "goodput": [one.model_dump(mode="json") for one in found.goodput],
                    "error": found.error,
                }
                for name, found in measured.items()
            }
        )
        return
    print_table(
        _COLUMNS, (line for name, found in measured.items() for line in _lines(name, found))
    )
    for name, found in measured.items():
        for note in _notes(name, found):
            click.echo(note)


def _lines(name: str, found: BenchResult) -> Iterator[list[str]]:
    loads: list[tuple[str, Bench | RateBench]] = [
        *((f"{one.concurrency} at a time", one) for one in found.benches),
        *((f"{one.rate_per_s:g}/s {one.arrivals}", one) for one in found.rates),
    ]
    for load, one in loads:
        share = one.bandwidth.share if isinstance(one, Bench) and one.bandwidth else None
        yield [
            name,
            str(one.engine),
            load,
            f"{one.output_tokens_per_s:.1f}",
            f"{one.throughput_spread.low:.1f}–{one.throughput_spread.high:.1f}",
            f"{one.request_per_s:.2f}",
            f"{one.ttft_ms.p50:.0f}",
            f"{one.ttft_ms.p95:.0f}",
            f"{one.itl_ms.p50:.1f}",
            f"{one.itl_ms.p95:.1f}",
            "–" if share is None else f"{share:.0%}",
            str(one.errors),
        ]


def _notes(name: str, found: BenchResult) -> Iterator[str]:
    for goodput in found.goodput:
        slo = goodput.slo
        limits = [
            f"{what} ≤ {limit:g} ms"
            for what, limit in (("TTFT", slo.ttft_ms), ("ITL", slo.itl_ms))
            if limit is not None
        ]
        yield (
            f"{name}, {goodput.engine}: goodput {goodput.rate_per_s:.3g} requests/s "
            f"({', '.join(limits)} for {slo.share:.0%}); the search ended {goodput.ended}"
        )
    everything: list[Delivered] = [*found.benches, *found.rates]
    for one in everything:
        if one.cost_per_million_tokens is not None:
            yield f"{name}, {_load(one)}: {one.cost_per_million_tokens:.3g} per million tokens"
        if one.joules_per_token is not None:
            yield f"{name}, {_load(one)}: {one.joules_per_token:.3g} J per token"
        for change in one.changes:
            yield f"{name}, {_load(one)}: {change}"
    bound = [_load(one) for one in everything if one.client_bound]
    if bound:
        yield (
            f"{name}: the load generator was the bottleneck at {', '.join(bound)}: the engine may "
            "be faster than these figures"
        )
    if found.error:
        yield f"{name}: not everything was measured: {found.error}"


def _load(one: Delivered) -> str:
    if isinstance(one, Bench):
        return f"concurrency {one.concurrency}"
    assert isinstance(one, RateBench)
    return f"{one.rate_per_s:g} requests/s"
