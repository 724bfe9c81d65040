"""Which shape and colour each engine has in every chart, and what a series is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.ledger import Ledger
from quantkit.recommendation.candidates import Candidate, name_of
from quantkit.reports.labels import shorten

SHAPES = ("circle", "square", "diamond", "triangle")
"""One an engine, in this order, so that no engine is told by its colour alone."""
REACH = {"circle": 1.0, "square": 0.886, "diamond": 1.254, "triangle": 1.556}
"""How far a shape extends from its centre, for the area of a circle of radius 1."""


@dataclass(frozen=True)
class Engine:
    """An engine of a legend: its shape, and its colour's class in the stylesheet."""

    name: str
    """The engine with its version."""
    shape: str
    colour: str


def engines_of(ledger: Ledger) -> dict[str, Engine]:
    """Every engine of the benches, by its name without the version."""
    names = {name_of(bench): str(bench.engine) for row in ledger.variants for bench in row.bench}
    return {
        name: Engine(names[name], SHAPES[index % len(SHAPES)], f"e{index % len(SHAPES)}")
        for index, name in enumerate(sorted(names))
    }


def name(candidate: Candidate, ids: Sequence[str]) -> str:
    """The row's id; with the engine where ``ids``, those of all series, have it more than once."""
    if ids.count(candidate.row.id) > 1:
        return f"{shorten(candidate.row.id, 14)}, {shorten(candidate.engine, 8)}"
    return shorten(candidate.row.id)
