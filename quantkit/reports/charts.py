"""The two charts of panels: how far each variant drifted, and what it takes to serve it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from quantkit.ledger import Ledger, Metric, Row
from quantkit.ledger.load import Percentiles
from quantkit.reports import texts
from quantkit.reports.drifts import said
from quantkit.reports.format import fixed, milliseconds, number, plus_minus, signed, size
from quantkit.reports.noise import Z95, against_reference
from quantkit.reports.panels import Measure, Panels, Reading, lay_out
from quantkit.reports.scales import around, from_zero, logarithmic
from quantkit.reports.table import (
    accuracies,
    bench_of,
    concurrencies,
    engines,
    shown,
    task_title,
)

Read = Callable[[Row, str], list[Reading]]
"""What a panel shows of a row on a text."""


def drift_chart(ledger: Ledger) -> Panels | None:
    """KL divergence, perplexity, top-1 agreement and accuracies of every variant. Of several
    texts, each has a line of its own in a variant's row."""
    rows = [row for row in ledger.variants[1:] if row.texts or row.metrics]
    names = texts.names(ledger)

    def on_texts(read: Read) -> list[list[Reading]]:
        return [
            [
                replace(one, series=index, words=_words(one, name, names))
                for index, name in enumerate(names)
                for one in read(row, name)
            ]
            for row in rows
        ]

    measures = [
        Measure(
            "KL divergence",
            ("nats per token, log scale", "← nearer"),
            on_texts(_divergences),
            logarithmic,
            share=2.1,
        ),
        Measure(
            "Perplexity drift",
            ("percent", "0 = the reference"),
            on_texts(lambda row, text: _drift(row, ledger, "ppl", text)),
            around,
            line_at=0.0,
        ),
        Measure(
            "Top-1 agreement",
            ("percent of positions", "nearer →"),
            on_texts(_agreement),
            around,
            line_at=100.0,
        ),
    ]
    measures += [
        Measure(
            f"{task_title(name)} drift",
            ("points", "0 = the reference"),
            [_drift(row, ledger, name) for row in rows],
            around,
            line_at=0.0,
        )
        for name in accuracies(ledger)
    ]
    key = [
        ("median", 0, "median"),
        ("mean", 0, "mean, with its 95 % interval"),
        ("p99", 0, "99th percentile"),
    ]
    if texts.several(ledger):
        key += [("mean", i, texts.title(ledger, name)) for i, name in enumerate(names)]
    return lay_out(
        [(row.id, "") for row in rows],
        measures,
        row_height=max(34.0, 18.0 * len(names) + 8),
        key=key,
        summary="Drift of each variant from the reference: KL divergence, perplexity, top-1 "
        "agreement and accuracy, with 95 % intervals, on each text. The table has the same "
        "numbers.",
    )


def serving_chart(ledger: Ledger) -> Panels | None:
    """Throughput, latencies and memory of every variant on every engine that served it."""
    loads = shown(concurrencies(ledger))
    rows = [(row, engine) for row in ledger.variants for engine in engines(row)]
    return lay_out(
        [(row.id, engine) for row, engine in rows],
        [
            Measure(
                "Throughput",
                ("output tokens/s", "faster →"),
                [_rates(row, engine, loads) for row, engine in rows],
                from_zero,
            ),
            Measure(
                "First token",
                ("TTFT p50 to p95, log scale", "← sooner"),
                [_latencies(row, engine, loads, "ttft_ms") for row, engine in rows],
                logarithmic,
                share=1.2,
            ),
            Measure(
                "Between tokens",
                ("ITL p50 to p95, log scale", "← sooner"),
                [_latencies(row, engine, loads, "itl_ms") for row, engine in rows],
                logarithmic,
                share=1.2,
            ),
            Measure(
                "Memory",
                ("peak of the server, GB",),
                [_memory(row, engine, loads) for row, engine in rows],
                from_zero,
                share=0.9,
            ),
        ],
        row_height=max(38.0, 16.0 * len(loads) + 8),
        key=[
            ("bar", index, "1 request at a time" if load == 1 else f"{load} at a time")
            for index, load in enumerate(loads)
        ],
        summary="Throughput, time to first token, time between tokens and peak memory of each "
        "variant on its engine, by concurrency. The table has the same numbers.",
    )


def _words(reading: Reading, text: str, names: list[str]) -> str:
    """What a reading says, with its text where there are several."""
    return f"{reading.words}\non {text}" if reading.words and len(names) > 1 else reading.words


def _divergences(row: Row, text: str) -> list[Reading]:
    """Median, mean and 99th percentile; a log axis has no place for 0 and below."""
    found = {name: row.metric(f"kld_{name}", text) for name in ("median", "p99", "mean")}
    shown = {name: m.value for name, m in found.items() if m and 0 < m.value < math.inf}
    readings = []
    for name, metric in found.items():
        if metric is None or name not in shown:
            continue
        words = f"{row.id}\nKLD {name} {' '.join(plus_minus(metric.value, metric.stderr))} nats"
        span = _interval(metric) if name == "mean" else None
        readings.append(Reading(name, metric.value, words, span, capped=True))
    if len(shown) > 1:
        ends = (min(shown.values()), max(shown.values()))
        readings.insert(0, Reading("range", ends[0], "", ends))
    return readings


def _interval(metric: Metric) -> tuple[float, float] | None:
    if metric.stderr is None:
        return None
    half = Z95 * metric.stderr
    return metric.value - half, metric.value + half


def _drift(row: Row, ledger: Ledger, name: str, text: str | None = None) -> list[Reading]:
    """Against the reference, with the interval of the paired test."""
    one = against_reference(ledger, row, name, text)
    if one is None:
        return []
    what = "perplexity" if name == "ppl" else task_title(name)
    words = f"{row.id}\n{what} drift {said(one)}, {one.verdict}"
    span = None
    if one.low is not None and one.high is not None:
        span = (one.low, one.high)
        words += f"\n95 %: {signed(one.low, 2)} to {signed(one.high, 2)}"
    return [Reading("mean", one.drift, words, span, capped=True)]


def _agreement(row: Row, text: str) -> list[Reading]:
    metric = row.metric("top1_agreement", text)
    if metric is None:
        return []
    percent = 100 * metric.value
    half = 100 * Z95 * (metric.stderr or 0.0)
    words = f"{row.id}\ntop-1 agreement {fixed(percent, 2)} %"
    return [Reading("mean", percent, words, (percent - half, percent + half), capped=True)]


def _rates(row: Row, engine: str, loads: list[int]) -> list[Reading]:
    found = []
    for index, load in enumerate(loads):
        bench = bench_of(row, engine, load)
        if bench:
            words = f"{row.id}, {engine}, {load} at a time\n"
            words += f"{number(bench.output_tokens_per_s)} output tokens/s"
            words += f"\n{number(bench.request_per_s)} requests/s, {bench.requests} completed"
            found.append(Reading("bar", bench.output_tokens_per_s, words, series=index))
    return found


def _latencies(row: Row, engine: str, loads: list[int], name: str) -> list[Reading]:
    found = []
    for index, load in enumerate(loads):
        bench = bench_of(row, engine, load)
        if bench:
            times: Percentiles = getattr(bench, name)
            words = f"{row.id}, {engine}, {load} at a time\n" + ", ".join(
                f"p{percent} {milliseconds(getattr(times, f'p{percent}'))}"
                for percent in (50, 95, 99)
            )
            span = (times.p50, times.p95)
            found.append(Reading("latency", times.p50, words, span, series=index))
    return [reading for reading in found if reading.value > 0]


def _memory(row: Row, engine: str, loads: list[int]) -> list[Reading]:
    found = []
    for index, load in enumerate(loads):
        bench = bench_of(row, engine, load)
        if bench:
            words = f"{row.id}, {engine}, {load} at a time\npeak {size(bench.peak_rss_bytes)}"
            found.append(Reading("bar", bench.peak_rss_bytes / 1e9, words, series=index))
    return found
