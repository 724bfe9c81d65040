"""The picture people come for: quality lost against throughput, a point a variant and engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantkit.ledger import Ledger
from quantkit.report.format import count, fixed, number, plus_minus, size
from quantkit.report.labels import Anchor, Box, Label, place, shorten
from quantkit.report.noise import Z95, Served
from quantkit.report.scales import Scale, Tick, from_zero, logarithmic
from quantkit.report.table import concurrencies, served

WIDTH, HEIGHT = 960.0, 560.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 74.0, WIDTH - 18.0, 62.0, HEIGHT - 50.0
_ZERO_BAND = 62.0
"""Height of the strip under the logarithmic axis in which a divergence of 0 has its place."""
_LARGEST = 25.0
_SMALLEST = 4.0
"""Radii in pixels of circles; other shapes have the same area."""
SHAPES = ("circle", "square", "diamond", "triangle")
"""One an engine, in this order, so that no engine is told by its colour alone."""
_REACH = {"circle": 1.0, "square": 0.886, "diamond": 1.254, "triangle": 1.556}
"""How far a shape extends from its centre, for the area of a circle of radius 1."""


@dataclass(frozen=True)
class Engine:
    """An engine of the legend: its shape, and its colour's class in the stylesheet."""

    name: str
    shape: str
    colour: str


@dataclass(frozen=True)
class Point:
    """A marker: where, which shape and radius, its error bar, and its exact values in words."""

    id: str
    x: float
    y: float
    radius: float
    engine: Engine
    whisker: tuple[float, float] | None
    """Both ends in pixels of the 95 % interval of the divergence."""
    label: Label | None
    """None where the chart is too full."""
    words: str


@dataclass(frozen=True)
class Guide:
    """A vertical line at the reference's throughput on one engine."""

    x: float
    engine: Engine


@dataclass(frozen=True)
class SizeKey:
    """A circle of the legend and the bytes that it stands for."""

    radius: float
    text: str


@dataclass(frozen=True)
class Tradeoff:
    """The chart at one concurrency."""

    concurrency: int
    plot: Box
    zero: float
    """Top of the strip of divergence 0."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    points: list[Point]
    guides: list[Guide]
    engines: list[Engine]
    sizes: list[SizeKey]
    missing: list[str]
    """Ids that have no place here, for want of a divergence or of a bench."""
    unlabelled: list[str]
    """Ids of points that found no room for their label."""
    summary: str

    width = WIDTH
    height = HEIGHT


def tradeoffs(ledger: Ledger) -> list[Tradeoff]:
    """One chart a concurrency at which anything has both coordinates, highest concurrency first."""
    charts = [_tradeoff(ledger, concurrency) for concurrency in concurrencies(ledger)[::-1]]
    return [chart for chart in charts if chart.points]


def _tradeoff(ledger: Ledger, concurrency: int) -> Tradeoff:
    drawn = [one for one in served(ledger, concurrency) if _divergence(ledger, one) is not None]
    names = sorted({bench.engine for row in ledger.variants for bench in row.bench})
    engines = {
        name: Engine(name, SHAPES[index % len(SHAPES)], f"e{index % len(SHAPES)}")
        for index, name in enumerate(names)
    }
    lost = [_divergence(ledger, one) or 0.0 for one in drawn]
    rates = [one.bench.output_tokens_per_s for one in drawn]
    x = from_zero(rates, _LEFT, _RIGHT)
    y = logarithmic(lost, _BOTTOM - _ZERO_BAND - _LARGEST, _TOP + _LARGEST)
    largest = max((row.bytes or 0 for row in ledger.variants), default=0)
    places = [
        Anchor(
            x(one.bench.output_tokens_per_s),
            y(value) if value > 0 else _BOTTOM - _ZERO_BAND / 2,
            _radius(one.row.bytes, largest) * _REACH[engines[one.bench.engine].shape],
            shorten(one.row.id),
        )
        for one, value in zip(drawn, lost, strict=True)
    ]
    plot = Box(_LEFT, _TOP, _RIGHT, _BOTTOM)
    labels = place(places, plot)
    shown = {one.row.id for one in drawn}
    return Tradeoff(
        concurrency=concurrency,
        plot=plot,
        zero=_BOTTOM - _ZERO_BAND,
        x_ticks=x.ticks(8),
        y_ticks=y.ticks(7),
        points=[
            Point(
                id=one.row.id,
                x=anchor.x,
                y=anchor.y,
                radius=_radius(one.row.bytes, largest),
                engine=engines[one.bench.engine],
                whisker=_whisker(one, y),
                label=label,
                words=_words(ledger, one),
            )
            for one, anchor, label in zip(drawn, places, labels, strict=True)
        ],
        guides=[
            Guide(anchor.x, engines[one.bench.engine])
            for one, anchor in zip(drawn, places, strict=True)
            if one.row is ledger.reference
        ],
        engines=list(engines.values()),
        sizes=_size_keys(largest),
        missing=[row.id for row in ledger.variants if row.id not in shown],
        unlabelled=[one.row.id for one, label in zip(drawn, labels, strict=True) if not label],
        summary=_summary(drawn, concurrency),
    )


def _divergence(ledger: Ledger, one: Served) -> float | None:
    """Mean KL divergence in nats; of the reference from itself 0; None where not to be drawn."""
    rate = one.bench.output_tokens_per_s
    value = 0.0
    if one.row is not ledger.reference:
        metric = one.row.metrics.get("kld_mean")
        value = metric.value if metric else math.nan
    return value if math.isfinite(value) and math.isfinite(rate) else None


def _radius(bytes_: int | None, largest: int) -> float:
    """Radius of a circle whose area is in proportion to the bytes."""
    return max(_SMALLEST, _LARGEST * math.sqrt((bytes_ or 0) / largest)) if largest else _SMALLEST


def _whisker(one: Served, y: Scale) -> tuple[float, float] | None:
    metric = one.row.metrics.get("kld_mean")
    if metric is None or metric.stderr is None or metric.value <= 0:
        return None
    half = Z95 * metric.stderr
    if not math.isfinite(half):
        return None
    return y(metric.value - half), y(metric.value + half)


def _size_keys(largest: int) -> list[SizeKey]:
    """The largest model and a round part of it."""
    if not largest:
        return []
    return [SizeKey(_radius(bytes_, largest), size(bytes_)) for bytes_ in (largest, largest // 4)]


def _words(ledger: Ledger, one: Served) -> str:
    """Everything about a point, a line each: for the tooltip and for a screen reader."""
    row, bench = one.row, one.bench
    lines = [row.id, bench.engine, f"{number(bench.output_tokens_per_s)} output tokens/s"]
    metric = row.metrics.get("kld_mean")
    if row is ledger.reference:
        lines.append("the reference: divergence 0")
    elif metric is not None:
        lines.append(f"KLD mean {' '.join(plus_minus(metric.value, metric.stderr))} nats")
    agreement = row.metrics.get("top1_agreement")
    if agreement is not None:
        lines.append(f"top-1 agreement {fixed(100 * agreement.value, 1)} %")
    bits = "" if row.bits_per_weight is None else f", {fixed(row.bits_per_weight, 2)} bits/weight"
    return "\n".join([*lines, f"{size(row.bytes)}{bits}"])


def _summary(drawn: list[Served], concurrency: int) -> str:
    points = "1 point" if len(drawn) == 1 else f"{count(len(drawn))} points"
    return (
        f"Mean KL divergence (logarithmic) against output tokens per second with {concurrency} "
        f"concurrent requests; {points}, sized by bytes on disk. The table has the same numbers."
    )
