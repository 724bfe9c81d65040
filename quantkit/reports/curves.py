"""Throughput over the number of requests at a time: a line a variant and engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.ledger import Ledger
from quantkit.recommendation import Candidate, Recommendation, candidates
from quantkit.recommendation.candidates import throughput
from quantkit.reports.format import milliseconds, number, span
from quantkit.reports.scales import Scale, Tick, from_zero
from quantkit.reports.series import Engine, engines_of, name
from quantkit.reports.table import concurrencies

WIDTH = 960.0
_LEFT, _RIGHT, _TOP = 62.0, WIDTH - 212.0, 20.0
_ROOM = 17.0
"""Between the labels of two lines, in pixels."""
_FEWEST_LEVELS = 3
"""Below this a line says no more than bars do."""


@dataclass(frozen=True)
class Stop:
    """One load: where, its interval upright, and its values in words."""

    x: float
    y: float
    upright: tuple[float, float]
    client_bound: bool
    words: str


@dataclass(frozen=True)
class Curve:
    """A variant on an engine, from the lowest concurrency up."""

    id: str
    engine: Engine
    path: str
    stops: list[Stop]
    recommended: bool
    label: str
    label_y: float


@dataclass(frozen=True)
class Curves:
    """The chart in pixels; ``label_x`` is where all labels begin."""

    height: float
    plot: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    curves: list[Curve]
    engines: list[Engine]
    client_bound: bool
    """Whether any load was."""
    summary: str

    width = WIDTH
    label_x = _RIGHT + 24.0


def curves(ledger: Ledger, found: Recommendation | None = None) -> Curves | None:
    """None where fewer than three concurrencies were benched."""
    levels = concurrencies(ledger)
    served = candidates(ledger)
    if len(levels) < _FEWEST_LEVELS or not served:
        return None
    bottom = _TOP + max(380.0, _ROOM * len(served) + 20)
    x = Scale(levels[0], levels[-1], _LEFT + 16, _RIGHT, log=True)
    highest = [throughput(bench).high for one in served for bench in one.benches]
    y = from_zero([one for one in highest if math.isfinite(one)], bottom, _TOP)
    engines = engines_of(ledger)
    ends = [y(one.benches[-1].output_tokens_per_s) for one in served]
    heights = spread_out(ends, _ROOM, _TOP + 4, bottom)
    pick = found.pick.candidate.key if found and found.pick else None
    ids = [one.row.id for one in served]
    drawn = [
        _curve(one, name(one, ids), engines[one.engine], x, y, height, one.key == pick)
        for one, height in zip(served, heights, strict=True)
    ]
    return Curves(
        height=bottom + 46,
        plot=(_LEFT, _TOP, _RIGHT, bottom),
        x_ticks=[Tick(x(level), str(level)) for level in _spaced(levels, x)],
        y_ticks=y.ticks(7),
        curves=drawn,
        engines=[engines[name] for name in sorted({one.engine for one in served})],
        client_bound=any(stop.client_bound for curve in drawn for stop in curve.stops),
        summary="Output tokens per second over the number of concurrent requests, a line for each "
        "variant and engine, with 95 % intervals. The table of all loads has the same numbers.",
    )


def spread_out(wanted: Sequence[float], room: float, top: float, bottom: float) -> list[float]:
    """Heights as near to ``wanted`` as ``room`` between any two allows, in the same order.

    Neighbours that would touch stand as a block around the middle of what they want.
    """
    blocks: list[tuple[float, list[int]]] = []
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        members = [i]
        while True:
            half = room * (len(members) - 1) / 2
            middle = sum(wanted[j] for j in members) / len(members)
            middle = min(max(middle, top + half), bottom - half)
            if not blocks or middle - blocks[-1][0] >= room * len(blocks[-1][1] + members) / 2:
                break
            members = blocks.pop()[1] + members
        blocks.append((middle, members))
    found = [0.0] * len(wanted)
    for middle, members in blocks:
        for index, i in enumerate(members):
            found[i] = round(middle + room * (index - (len(members) - 1) / 2), 2)
    return found


def _curve(
    one: Candidate,
    label: str,
    engine: Engine,
    x: Scale,
    y: Scale,
    label_y: float,
    recommended: bool,
) -> Curve:
    stops = []
    for bench in one.benches:
        rate = throughput(bench)
        words = [
            one.row.id,
            f"{bench.engine}, {bench.concurrency} at a time",
            f"{span(rate)} output tokens/s",
            f"{number(bench.request_per_s)} requests/s",
            f"TTFT p50 {milliseconds(bench.ttft_ms.p50)}, p95 {milliseconds(bench.ttft_ms.p95)}",
            f"ITL p50 {milliseconds(bench.itl_ms.p50)}, p95 {milliseconds(bench.itl_ms.p95)}",
        ]
        if bench.client_bound:
            words.append("the load generator was the bottleneck")
        stops.append(
            Stop(
                x(bench.concurrency), y(rate.value), (y(rate.low), y(rate.high)),
                bench.client_bound, "\n".join(words),
            )
        )  # fmt: skip
    points = " ".join(f"{stop.x:g} {stop.y:g}" for stop in stops)
    return Curve(one.row.id, engine, f"M{points}", stops, recommended, label, label_y)


def _spaced(levels: Sequence[int], x: Scale) -> list[int]:
    """Levels whose numbers do not touch."""
    found: list[int] = []
    for level in levels:
        if not found or x(level) - x(found[-1]) > 26:
            found.append(level)
    return found
