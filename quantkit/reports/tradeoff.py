"""The picture people come for: quality lost against throughput, and the front that nobody beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.ledger import REFERENCE, Ledger
from quantkit.recommendation import Interval, Recommendation
from quantkit.recommendation.front import Placed, Standing, front
from quantkit.recommendation.nearness import divergences
from quantkit.reports.format import count, fixed, plus_minus, size, span
from quantkit.reports.labels import Anchor, Box, Label, place
from quantkit.reports.prose import Prose, plain
from quantkit.reports.recommendation import listing, on_engine
from quantkit.reports.scales import Scale, Tick, from_zero, logarithmic
from quantkit.reports.series import REACH, Engine, engines_of, name
from quantkit.reports.table import concurrencies

WIDTH, HEIGHT = 960.0, 560.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 74.0, WIDTH - 18.0, 62.0, HEIGHT - 50.0
_ZERO_BAND = 62.0
"""Height of the strip under the logarithmic axis in which a divergence of 0 has its place."""
_LARGEST = 20.0
_SMALLEST = 4.0
"""Radii in pixels of circles; other shapes have the same area."""
_RING = 7.0
"""Pixels that the mark of the recommended variant adds to the radius."""


@dataclass(frozen=True)
class Point:
    """A marker: where, which shape and radius, both intervals, and its exact values in words."""

    id: str
    x: float
    y: float
    radius: float
    engine: Engine
    standing: Standing
    across: tuple[float, float]
    """Both ends in pixels of the throughput's interval."""
    upright: tuple[float, float] | None
    """The ends of the divergence's interval; None for a divergence of 0."""
    recommended: bool
    label: Label | None
    """None where the chart is too full."""
    words: str


@dataclass(frozen=True)
class SizeKey:
    """A circle of the legend and the bytes that it stands for."""

    radius: float
    text: str


@dataclass(frozen=True)
class Tradeoff:
    """The chart at one concurrency."""

    concurrency: int
    drift: str
    """What the vertical axis is."""
    plot: Box
    zero: float
    """Top of the strip of divergence 0."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    points: list[Point]
    line: str
    """The front as the path of an SVG: what lies above and left of it is beaten."""
    engines: list[Engine]
    sizes: list[SizeKey]
    says: Prose
    """Ids on the front, beaten, and undecided."""
    missing: list[str]
    """Ids that have no place here, for want of a divergence or of a bench."""
    unlabelled: list[str]
    """Ids of points that found no room for their label."""
    summary: str

    width = WIDTH
    height = HEIGHT


def tradeoffs(ledger: Ledger, found: Recommendation | None = None) -> list[Tradeoff]:
    """One chart a concurrency at which any variant has both coordinates, highest concurrency first.

    What is recommended is marked where the recommendation is for that concurrency.
    """
    charts = []
    for concurrency in concurrencies(ledger)[::-1]:
        placed = front(ledger, concurrency)
        if any(one.candidate.row.id != REFERENCE for one in placed):
            here = found is not None and found.concurrency == concurrency
            pick = found.pick.candidate.key if found and found.pick and here else None
            charts.append(_tradeoff(ledger, concurrency, placed, pick))
    return charts


def _tradeoff(
    ledger: Ledger, concurrency: int, placed: list[Placed], pick: tuple[str, str] | None
) -> Tradeoff:
    engines = engines_of(ledger)
    x = from_zero([one.throughput.high for one in placed], _LEFT, _RIGHT)
    y = _Drift([one.divergence for one in placed])
    largest = max((row.bytes or 0 for row in ledger.variants), default=0)
    ids = [one.candidate.row.id for one in placed]
    anchors = [
        Anchor(
            x(one.throughput.value),
            y(one.divergence.value),
            _radius(one.candidate.row.bytes, largest) * REACH[engines[one.candidate.engine].shape]
            + (_RING if one.candidate.key == pick else 0.0),
            name(one.candidate, ids),
        )
        for one in placed
    ]
    plot = Box(_LEFT, _TOP, _RIGHT, _BOTTOM)
    labels = place(anchors, plot)
    drift = "KL divergence on the worst text" if len(ledger.texts) > 1 else "mean KL divergence"
    return Tradeoff(
        concurrency=concurrency,
        drift=drift,
        plot=plot,
        zero=_BOTTOM - _ZERO_BAND,
        x_ticks=x.ticks(8),
        y_ticks=y.scale.ticks(7),
        points=[
            Point(
                id=one.candidate.row.id,
                x=anchor.x,
                y=anchor.y,
                radius=_radius(one.candidate.row.bytes, largest),
                engine=engines[one.candidate.engine],
                standing=one.standing,
                across=(x(one.throughput.low), x(one.throughput.high)),
                upright=y.ends(one.divergence),
                recommended=one.candidate.key == pick,
                label=label,
                words=_words(one),
            )
            for one, anchor, label in zip(placed, anchors, labels, strict=True)
        ],
        line=_line([(a.x, a.y) for a, one in zip(anchors, placed, strict=True) if one.on_line]),
        engines=list(engines.values()),
        sizes=_size_keys(largest),
        says=_says(placed),
        missing=[row.id for row in ledger.variants if row.id not in ids],
        unlabelled=[id_ for id_, label in zip(ids, labels, strict=True) if not label],
        summary=_summary(placed, concurrency, drift),
    )


class _Drift:
    """The vertical axis: logarithmic, with a strip for a divergence of 0 and less."""

    def __init__(self, drifts: Sequence[Interval]) -> None:
        ends = [end for one in drifts for end in (one.value, one.high) if one.value > 0]
        self.scale: Scale = logarithmic(ends, _BOTTOM - _ZERO_BAND - _LARGEST, _TOP + _LARGEST)

    def __call__(self, value: float) -> float:
        return self.scale(value) if value > 0 else _BOTTOM - _ZERO_BAND / 2

    def ends(self, drift: Interval) -> tuple[float, float] | None:
        if drift.value <= 0 or drift.low == drift.high:
            return None
        return self.scale(drift.low), self.scale(drift.high)


def _line(points: Sequence[tuple[float, float]]) -> str:
    """Steps from the top, above the fastest, to the left, beside the nearest."""
    path = ""
    for x, y in sorted(points, reverse=True):
        path += f"H{x:g}V{y:g}" if path else f"M{x:g} {_TOP:g}V{y:g}"
    return f"{path}H{_LEFT:g}" if path else ""


def _radius(bytes_: int | None, largest: int) -> float:
    """Radius of a circle whose area is in proportion to the bytes."""
    return max(_SMALLEST, _LARGEST * ((bytes_ or 0) / largest) ** 0.5) if largest else _SMALLEST


def _size_keys(largest: int) -> list[SizeKey]:
    """The largest model and a round part of it."""
    if not largest:
        return []
    return [SizeKey(_radius(bytes_, largest), size(bytes_)) for bytes_ in (largest, largest // 4)]


def _words(one: Placed) -> str:
    """Everything about a point, a line each: for the tooltip and for a screen reader."""
    row, bench = one.candidate.row, one.candidate.benches[0]
    lines = [row.id, str(bench.engine), f"{span(one.throughput)} output tokens/s"]
    if row.id == REFERENCE:
        lines.append("the reference: divergence 0")
    for text, metric in divergences(row.texts).items() if row.id != REFERENCE else ():
        on = f" on {text}" if len(row.texts) > 1 else ""
        lines.append(f"KLD mean {' '.join(plus_minus(metric.value, metric.stderr))} nats{on}")
        agreement = row.metric("top1_agreement", text)
        if agreement is not None:
            lines.append(f"top-1 agreement {fixed(100 * agreement.value, 1)} %{on}")
    bits = "" if row.bits_per_weight is None else f", {fixed(row.bits_per_weight, 2)} bits/weight"
    return "\n".join([*lines, f"{size(row.bytes)}{bits}", _stands(one)])


def _stands(one: Placed) -> str:
    if one.standing == "front":
        return "on the front: no other is both faster and nearer"
    if one.standing == "dominated":
        best = max(one.beaten_by, key=lambda other: other.benches[-1].output_tokens_per_s)
        return f"beaten in both by {plain(on_engine(best))}"
    others = [plain(on_engine(other)) for other in one.may_be_beaten_by[:2]]
    return f"not decided against {' and '.join(others)}"


def _says(placed: Sequence[Placed]) -> Prose:
    text: Prose = ()
    for standing, before, after in (
        ("front", "No other is both faster and nearer to the reference than ", ". "),
        ("undecided", "Inside the noise, so on the front or just behind it: ", ". "),
        ("dominated", "Beaten in both, beyond the noise: ", ". "),
    ):
        ones = [one.candidate for one in placed if one.standing == standing]
        if ones:
            text += (before, *listing(ones), after)
    return text


def _summary(placed: Sequence[Placed], concurrency: int, drift: str) -> str:
    points = "1 point" if len(placed) == 1 else f"{count(len(placed))} points"
    requests = "1 request" if concurrency == 1 else f"{concurrency} requests"
    return (
        f"{drift[0].upper()}{drift[1:]} (logarithmic) against output tokens per second with "
        f"{requests} at a time; {points}, sized by bytes on disk, with the Pareto front. The "
        "table has the same numbers."
    )
