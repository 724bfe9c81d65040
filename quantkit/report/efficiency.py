"""What serving takes: goodput, the physical limit, money, energy and the start; every load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.ledger import Ledger
from quantkit.load import Bench, Goodput
from quantkit.recommend import Candidate, candidates, said
from quantkit.recommend.candidates import throughput
from quantkit.report.format import NOTHING, duration, milliseconds, number, size, span
from quantkit.report.panels import Measure, Panels, Reading, lay_out
from quantkit.report.scales import from_zero
from quantkit.report.table import concurrencies


@dataclass(frozen=True)
class Loads:
    """Every load of every variant: titles of the columns, and a row a load."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]
    """Id, engine, cells."""


def efficiency_chart(ledger: Ledger) -> Panels | None:
    """A row a variant and engine; panels of what no row has are left out."""
    served = candidates(ledger)
    levels = concurrencies(ledger)
    if not served:
        return None
    first, last = levels[0], levels[-1]
    objectives = {said(good.slo) for one in served for good in one.goodputs}
    measures = [
        Measure(
            "Goodput",
            ("requests/s, faster →", objectives.pop() if len(objectives) == 1 else "several SLOs"),
            [[_goodput(one, good) for good in one.goodputs] for one in served],
            from_zero,
            share=1.4,
        ),
        Measure(
            "Of the physical limit",
            ("% of bandwidth", _load(first)),
            [_reading(one, first, _limit, _limit_words) for one in served],
            lambda values, start, end: from_zero([*values, 100.0], start, end),
            share=1.2,
            line_at=100.0,
        ),
        Measure(
            "Cost",
            ("10⁶ output tokens", _load(last)),
            [_reading(one, last, _cost, _cost_words) for one in served],
            from_zero,
        ),
        Measure(
            "Energy",
            ("J per output token", _load(last)),
            [_reading(one, last, _energy, _energy_words) for one in served],
            from_zero,
        ),
        Measure(
            "Start",
            ("seconds to ready",),
            [_reading(one, first, _start, _start_words) for one in served],
            from_zero,
        ),
    ]
    return lay_out(
        [(one.row.id, one.benches[0].engine) for one in served],
        measures,
        row_height=38.0,
        summary="Goodput, share of the memory bandwidth, cost, energy and start-up of each variant "
        "on its engine. The table of all loads has the same numbers.",
    )


def loads(ledger: Ledger) -> Loads:
    """Columns that no load has a value for are left out."""
    benches = [(one, bench) for one in candidates(ledger) for bench in one.benches]
    columns: list[tuple[str, Callable[[Bench], str]]] = [
        ("at a time", lambda b: str(b.concurrency)),
        ("tokens/s", lambda b: span(throughput(b))),
        ("requests/s", lambda b: number(b.request_per_s)),
        ("TTFT p50, p95", lambda b: _both(b.ttft_ms.p50, b.ttft_ms.p95)),
        ("ITL p50, p95", lambda b: _both(b.itl_ms.p50, b.itl_ms.p95)),
        ("met the objective", lambda b: _percent(b.attained)),
        ("of bandwidth", lambda b: _percent(b.bandwidth.share if b.bandwidth else None)),
        ("while decoding", lambda b: _percent(b.bandwidth.decode_share if b.bandwidth else None)),
        ("J/token", lambda b: number(b.joules_per_token)),
        ("cost of 10⁶ tokens", lambda b: number(b.cost_per_million_tokens)),
        ("memory", lambda b: size(b.peak_rss_bytes)),
        ("completed", lambda b: str(b.requests)),
        ("failed", lambda b: str(b.errors) if b.errors else NOTHING),
        ("client", lambda b: "bottleneck" if b.client_bound else NOTHING),
    ]
    filled = [(title, [say(bench) for _, bench in benches]) for title, say in columns]
    kept = [(title, cells) for title, cells in filled if set(cells) != {NOTHING}]
    return Loads(
        tuple(title for title, _ in kept),
        tuple(
            (one.row.id, bench.engine, tuple(cells[index] for _, cells in kept))
            for index, (one, bench) in enumerate(benches)
        ),
    )


def _load(concurrency: int) -> str:
    return f"{concurrency} at a time"


def _goodput(one: Candidate, good: Goodput) -> Reading:
    words = [
        f"{one.row.id}, {one.engine}",
        f"{number(good.rate_per_s)} requests/s met {said(good.slo)}",
        "none above was tried"
        if good.above_per_s is None
        else f"{number(good.above_per_s)} requests/s did not",
        f"{number(good.output_tokens_per_s)} output tokens/s",
    ]
    if good.cost_per_million_tokens is not None:
        words.append(f"{number(good.cost_per_million_tokens)} for a million output tokens")
    ends = None if good.above_per_s is None else (good.rate_per_s, good.above_per_s)
    return Reading("bar", good.rate_per_s, "\n".join(words), ends)


def _reading(
    one: Candidate,
    level: int,
    figure: Callable[[Bench], float | None],
    words: Callable[[Bench], str],
) -> list[Reading]:
    bench = next((bench for bench in one.benches if bench.concurrency == level), None)
    value = figure(bench) if bench else None
    if bench is None or value is None:
        return []
    return [Reading("bar", value, f"{one.row.id}, {one.engine}\n{words(bench)}")]


def _limit(bench: Bench) -> float | None:
    return None if bench.bandwidth is None else 100 * bench.bandwidth.decode_share


def _limit_words(bench: Bench) -> str:
    assert bench.bandwidth is not None
    return (
        f"{_percent(bench.bandwidth.decode_share)} of the memory bandwidth while it writes, "
        f"{_percent(bench.bandwidth.share)} with the prompts' time"
    )


def _cost(bench: Bench) -> float | None:
    return bench.cost_per_million_tokens


def _cost_words(bench: Bench) -> str:
    return f"{number(bench.cost_per_million_tokens)} for a million output tokens"


def _energy(bench: Bench) -> float | None:
    return bench.joules_per_token


def _energy_words(bench: Bench) -> str:
    return f"{number(bench.joules_per_token)} J per output token, the whole machine"


def _start(bench: Bench) -> float | None:
    return bench.startup_seconds


def _start_words(bench: Bench) -> str:
    read = "" if bench.load_seconds is None else f", {duration(bench.load_seconds)} of it reading"
    return f"{duration(bench.startup_seconds)} until it answers{read}"


def _both(median: float, p95: float) -> str:
    return f"{milliseconds(median)}, {milliseconds(p95)}"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{number(100 * share, 2)} %"
