"""The course of a run: its steps one after the other, with an estimate of the time left."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from quantkit.reports.underway import Underway, roughly
from quantkit.runs.board import board
from quantkit.system.progress import say

_FOUND = 0.05
"""A step that takes less than this share of its usual time had been done by an earlier run, and
says nothing about the machine."""


@dataclass(frozen=True)
class Step:
    """One stage of one row. ``usual_seconds``: on two ordinary cores, roughly."""

    row: str
    stage: str
    usual_seconds: float
    work: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.row}: {self.stage}"


class Pace:
    """How long steps take on this machine, learned from those that were done."""

    def __init__(self) -> None:
        self._took: defaultdict[str, float] = defaultdict(float)
        self._usual: defaultdict[str, float] = defaultdict(float)

    def note(self, step: Step, seconds: float) -> None:
        """Learn from a step that took ``seconds``."""
        if seconds >= _FOUND * step.usual_seconds:
            self._took[step.stage] += seconds
            self._usual[step.stage] += step.usual_seconds

    def seconds(self, steps: Sequence[Step]) -> float:
        """How long these will take: as the steps of the same stage did, else as all together."""
        took, usual = sum(self._took.values()), sum(self._usual.values())
        overall = took / usual if usual else 1.0
        return sum(
            step.usual_seconds
            * (
                self._took[step.stage] / self._usual[step.stage]
                if step.stage in self._usual
                else overall
            )
            for step in steps
        )


def run_course(
    steps: Sequence[Step],
    publish: Callable[[Underway], object],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Do all steps in order; ``publish`` is called before each, and where one raises. An error of
    its own is reported, and the steps go on."""
    pace = Pace()
    with board([(step.row, step.stage) for step in steps]) as shown:
        for index, step in enumerate(steps):
            ahead = steps[index:]
            waiting = tuple(dict.fromkeys(one.row for one in ahead))
            left = pace.seconds(ahead)
            underway = Underway(str(step), index, len(steps), waiting, left)
            title = f"[{index + 1}/{len(steps)}] {step} (about {roughly(left)} left)"
            try:
                shown.begin((step.row, step.stage), title)
                _try(publish, underway)
                started = clock()
                step.work()
            except BaseException:
                _try(publish, replace(underway, ended=True))
                raise
            pace.note(step, clock() - started)
            shown.end((step.row, step.stage))


def _try(publish: Callable[[Underway], object], underway: Underway) -> None:
    """Report an error of ``publish`` and go on: it is no reason to lose hours of work."""
    try:
        publish(underway)
    except Exception as error:
        say(f"the report could not be written at this step: {error!r}")
