"""What serving takes: goodput, the physical limit, money, energy and the start; every load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.ledger import Ledger
from quantkit.ledger.load import Bench, Goodput, RateBench
from quantkit.recommendation import Candidate, candidates, said
from quantkit.recommendation.candidates import throughput
from quantkit.reports.format import NOTHING, duration, milliseconds, number, size, span
from quantkit.reports.panels import Measure, Panels, Reading, lay_out
from quantkit.reports.scales import from_zero
from quantkit.reports.table import Cell, concurrencies


@dataclass(frozen=True)
class Loads:
    """Every load of every variant and its goodputs: titles of the columns, and a row each."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]
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
        [(one.row.id, str(one.benches[0].engine)) for one in served],
        measures,
        row_height=38.0,
        summary="Goodput, share of the memory bandwidth, cost, energy and start-up of each variant "
        "on its engine. The table of all loads has the same numbers.",
    )


def loads(ledger: Ledger) -> Loads:
    """Closed loops, open loops and goodputs; columns that nothing has a value for are left out."""
    found = [
        (row.id, engine, cells)
        for row in ledger.variants
        for engine, cells in (
            *((str(one.engine), _delivered(one)) for one in row.bench),
            *((str(one.engine), _delivered(one)) for one in row.rates),
            *((str(one.engine), _goodput_cells(one)) for one in row.goodput),
        )
    ]
    titles = [title for title in _COLUMNS if any(title in cells for *_, cells in found)]
    return Loads(
        tuple(titles),
        tuple(
            (id_, engine, tuple(cells.get(title, Cell(NOTHING)) for title in titles))
            for id_, engine, cells in found
        ),
    )


_COLUMNS = (
    "load", "tokens/s", "requests/s", "TTFT p50, p95", "ITL p50, p95", "met the objective",
    "of bandwidth", "while decoding", "J/token", "cost of 10⁶ tokens", "memory", "completed",
    "failed", "client",
)  # fmt: skip


def _delivered(one: Bench | RateBench) -> dict[str, Cell]:
    """Values by column; columns without a value are left out."""
    bandwidth = one.bandwidth if isinstance(one, Bench) else None
    load = (
        _load(one.concurrency)
        if isinstance(one, Bench)
        else f"{number(one.rate_per_s)}/s, {one.arrivals}"
    )
    return _known(
        {
            "load": (load, None),
            "tokens/s": (span(throughput(one)), one.output_tokens_per_s),
            "requests/s": (number(one.request_per_s), one.request_per_s),
            "TTFT p50, p95": (_both(one.ttft_ms.p50, one.ttft_ms.p95), None),
            "ITL p50, p95": (_both(one.itl_ms.p50, one.itl_ms.p95), None),
            "met the objective": _share(one.attained),
            "of bandwidth": _share(bandwidth.share if bandwidth else None),
            "while decoding": _share(bandwidth.decode_share if bandwidth else None),
            "J/token": _number(one.joules_per_token),
            "cost of 10⁶ tokens": _number(one.cost_per_million_tokens),
            "memory": (size(one.peak_rss_bytes), one.peak_rss_bytes),
            "completed": (str(one.requests), one.requests),
            "failed": (str(one.errors or ""), one.errors),
            "client": ("bottleneck" if one.client_bound else "", None),
        }
    )


def _goodput_cells(one: Goodput) -> dict[str, Cell]:
    return _known(
        {
            "load": (f"goodput, {said(one.slo)}", None),
            "tokens/s": _number(one.output_tokens_per_s),
            "requests/s": (number(one.rate_per_s), one.rate_per_s),
            "met the objective": _share(one.attained),
            "cost of 10⁶ tokens": _number(one.cost_per_million_tokens),
        }
    )


def _known(texts: dict[str, tuple[str, float | None]]) -> dict[str, Cell]:
    return {title: Cell(text, sort=value) for title, (text, value) in texts.items() if text}


def _number(value: float | None) -> tuple[str, float | None]:
    return "" if value is None else number(value), value


def _share(value: float | None) -> tuple[str, float | None]:
    return _percent(value), value


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
    return "" if share is None else f"{number(100 * share, 2)} %"
