"""Charts of panels side by side that share their rows: one row a variant, one panel a measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from quantkit.reports.labels import shorten
from quantkit.reports.scales import Scale, Tick

WIDTH = 960.0
_NAMES = 168.0
_BETWEEN = 40.0
_TOP = 58.0
_BOTTOM = 34.0
_CHARACTER = 6.6
"""Width of a digit of a tick's text, in pixels."""


@dataclass(frozen=True)
class Reading:
    """One thing to draw in a row, in values: a mark with an interval or a range, or a bar.

    ``kind`` is the mark's class in the stylesheet: mean, median, p99, bar, and so on.
    ``span`` are both ends of the line through the mark; ``series`` picks line and colour where a
    row has several.
    """

    kind: str
    value: float
    words: str
    span: tuple[float, float] | None = None
    capped: bool = False
    """Whether the ends of ``span`` are an interval's, and drawn so."""
    series: int = 0


@dataclass(frozen=True)
class Measure:
    """One panel in values: its title, how its axis is made, and each row's readings."""

    title: str
    subtitle: tuple[str, ...]
    """Lines in small print."""
    readings: list[list[Reading]]
    scale: Callable[[Sequence[float], float, float], Scale]
    share: float = 1.0
    """Part of the chart's width, against the other panels'."""
    line_at: float | None = None
    """A value at which a line stands, for example no drift."""


@dataclass(frozen=True)
class Mark:
    """A reading in pixels."""

    kind: str
    x: float
    y: float
    words: str
    span: tuple[float, float] | None
    capped: bool
    series: int


@dataclass(frozen=True)
class Panel:
    """A measure in pixels."""

    title: str
    subtitle: tuple[str, ...]
    """Lines in small print."""
    left: float
    right: float
    ticks: list[Tick]
    line_at: float | None
    marks: list[Mark]


@dataclass(frozen=True)
class RowName:
    """What stands left of a row: the id, and a second line in small print."""

    text: str
    detail: str
    top: float
    y: float


@dataclass(frozen=True)
class Panels:
    """The chart in pixels."""

    summary: str
    height: float
    top: float
    bottom: float
    names: list[RowName]
    panels: list[Panel]
    key: list[tuple[str, int, str]] = field(default_factory=list)
    """Legend: kind of mark, series, what it is."""

    width = WIDTH


def lay_out(
    names: Sequence[tuple[str, str]],
    measures: Sequence[Measure],
    *,
    row_height: float,
    key: Sequence[tuple[str, int, str]] = (),
    summary: str,
) -> Panels | None:
    """Put measures side by side; those without any finite reading are left out.

    None where there is nothing to draw. In each panel a row is divided among its series.
    """
    drawn = [measure for measure in measures if any(_values(measure))]
    if not names or not drawn:
        return None
    bottom = _TOP + row_height * len(names)
    middles = [_TOP + row_height * (index + 0.5) for index in range(len(names))]
    room = WIDTH - _NAMES - _BETWEEN * len(drawn)
    total = sum(measure.share for measure in drawn)
    panels, left = [], _NAMES + _BETWEEN / 2
    for measure in drawn:
        right = left + room * measure.share / total
        panels.append(_panel(measure, left, right, middles, row_height))
        left = right + _BETWEEN
    return Panels(
        summary=summary,
        height=bottom + _BOTTOM,
        top=_TOP,
        bottom=bottom,
        names=[
            RowName(shorten(text, 20), shorten(detail, 24), y - row_height / 2, y)
            for (text, detail), y in zip(names, middles, strict=True)
        ],
        panels=panels,
        key=list(key),
    )


def _values(measure: Measure) -> list[float]:
    """Every finite value that the axis must hold."""
    found = []
    for readings in measure.readings:
        for reading in readings:
            found += [reading.value, *(reading.span or ())]
    return [value for value in found if math.isfinite(value)]


def _panel(
    measure: Measure,
    left: float,
    right: float,
    middles: list[float],
    row_height: float,
) -> Panel:
    series = 1 + max(one.series for readings in measure.readings for one in readings)
    values = _values(measure)
    if measure.line_at is not None:
        values.append(measure.line_at)
    scale = measure.scale(values, left, right)
    band = row_height * 0.68 / series
    marks = []
    for middle, readings in zip(middles, measure.readings, strict=True):
        for reading in readings:
            if not math.isfinite(reading.value):
                continue
            marks.append(
                Mark(
                    kind=reading.kind,
                    x=scale(reading.value),
                    y=round(middle + band * (reading.series - (series - 1) / 2), 2),
                    words=reading.words,
                    span=None
                    if reading.span is None or not all(map(math.isfinite, reading.span))
                    else (scale(reading.span[0]), scale(reading.span[1])),
                    capped=reading.capped,
                    series=reading.series,
                )
            )
    return Panel(
        title=measure.title,
        subtitle=measure.subtitle,
        left=left,
        right=right,
        ticks=_ticks(scale),
        line_at=None if measure.line_at is None else scale(measure.line_at),
        marks=marks,
    )


def _ticks(scale: Scale) -> list[Tick]:
    """As many ticks as fit without their labels touching."""
    ticks: list[Tick] = []
    for most in (7, 6, 5, 4, 3, 2):
        ticks = scale.ticks(most)
        if all(
            b.at - a.at > _CHARACTER * (len(a.text) + len(b.text)) / 2 + 8
            for a, b in pairwise(ticks)
        ):
            break
    return ticks
