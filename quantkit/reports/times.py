"""Where the run's time went: seconds by row and stage, each row as a bar."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.ledger import Ledger
from quantkit.reports.format import NOTHING, duration

_STAGES = ("prepare", "open", "convert", "evaluate", "compare", "bench", "split", "noise floor")
_LEAST = 0.5
"""Seconds below which a stage was only looked up, or is not worth a column."""


@dataclass(frozen=True)
class Piece:
    """One stage in a row's bar: where it begins and how long it is, of 100, and its colour."""

    title: str
    left: float
    width: float
    series: int


@dataclass(frozen=True)
class Line:
    """One row: its bar, the time of each stage, and all together."""

    id: str
    pieces: tuple[Piece, ...]
    cells: tuple[str, ...]
    total: str


@dataclass(frozen=True)
class Times:
    """Columns are the stages, in the order in which a row comes to them."""

    stages: tuple[str, ...]
    lines: tuple[Line, ...]
    rest: str
    """What belongs to no row."""


def times(ledger: Ledger) -> Times | None:
    """None where nothing was measured in this run."""
    spent = {
        row.id: {stage: took for stage, took in row.seconds.items() if took >= _LEAST}
        for row in ledger.variants
    }
    stages = tuple(stage for stage in _STAGES if any(stage in one for one in spent.values()))
    longest = max((sum(one.values()) for one in spent.values()), default=0.0)
    if not longest:
        return None
    lines = tuple(
        Line(
            id_,
            _pieces(one, stages, longest),
            tuple(duration(one[stage]) if stage in one else NOTHING for stage in stages),
            duration(sum(one.values())),
        )
        for id_, one in spent.items()
    )
    rest = ledger.seconds - sum(sum(one.values()) for one in spent.values())
    return Times(stages, lines, duration(max(0.0, rest)))


def _pieces(spent: dict[str, float], stages: tuple[str, ...], longest: float) -> tuple[Piece, ...]:
    pieces, left = [], 0.0
    for series, stage in enumerate(stages):
        if stage in spent:
            width = 100 * spent[stage] / longest
            title = f"{stage}: {duration(spent[stage])}"
            pieces.append(Piece(title, round(left, 2), round(width, 2), series % 6))
            left += width
    return tuple(pieces)
