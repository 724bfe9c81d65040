"""How far a run has come, for readers of its report meanwhile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Underway:
    """How far a run has come, for who reads its report meanwhile."""

    step: str
    """The step being done, or the last one when the run ended."""
    done: int
    total: int
    waiting: tuple[str, ...]
    """Ids of the rows with a step still to come, the current one included."""
    seconds_left: float
    ended: bool = False
    """Whether the run was interrupted here."""


def roughly(seconds: float) -> str:
    """Rounded as an estimate should be: ``20 s``, ``3 min``, ``1.5 h``."""
    if seconds < 55:
        return f"{max(10, round(seconds, -1)):.0f} s"
    if seconds < 55 * 60:
        return f"{max(1, round(seconds / 60)):.0f} min"
    return f"{round(seconds / 1800) / 2:g} h"
