"""How long the loads of one server may take, and what that leaves for each window."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from quantkit.benchmark.loads import Times

_BESIDES = 2.0
"""Seconds assumed for the load generator's own work at each load, until one has been measured."""


_MOST = 2.0
"""The first windows of all loads may together take this many times the budget if they must."""


class Budget:
    """``seconds`` for everything that one server is asked, warm-ups and the load generator's own
    time included; None: as long as it takes. The clock starts at once."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()
        self._besides = _BESIDES

    @property
    def left(self) -> float:
        """Seconds; 0 where it is spent."""
        return self._left(1.0)

    def cost(self, times: Times) -> float:
        """Seconds that a window takes in all."""
        return times.total + self._besides

    def note(self, times: Times, seconds: float) -> None:
        """Learn from a window that took ``seconds`` in all."""
        if seconds > times.total:  # less: it was found from before
            self._besides = seconds - times.total

    def first(self, wanted: Times, least: float, ahead: Sequence[Times], asked: Times) -> Times:
        """The first window of a load: each gets one, as long as was ``asked`` for in any case.

        As ``wanted``, or its share of what is left for it and all that is ``ahead``; but no shorter
        than ``least`` seconds while the budget is not exceeded by far.
        """
        fair = self._fair(wanted, ahead)
        if fair.window >= least:
            return fair
        enough = wanted.of_window(min(least, wanted.window))
        if self.cost(enough) <= self._left(_MOST):
            return enough
        return wanted.of_total(max(self._left(_MOST) - self._besides, asked.total))

    def another(self, wanted: Times, least: float, ahead: Sequence[Times]) -> Times | None:
        """A further window of a load: its share too, and None where that leaves no ``least``."""
        fair = self._fair(wanted, ahead)
        if fair.window >= least:
            return fair
        enough = wanted.of_window(min(least, wanted.window))
        return enough if self.cost(enough) <= self.left else None

    def longer(self, times: Times, factor: float, *, first: bool) -> Times | None:
        """A window that was too short so many times as long, or as the budget allows; None where
        that is no longer at all. ``first``: whether it is the load's first."""
        room = self._left(_MOST if first else 1.0) - self._besides
        longer = times.longer(min(factor, room / times.total))
        return longer if longer.window > times.window else None

    def _fair(self, wanted: Times, ahead: Sequence[Times]) -> Times:
        needed = sum(map(self.cost, (wanted, *ahead)))
        if needed <= self.left:
            return wanted
        return wanted.of_total(max(0.0, self.cost(wanted) * self.left / needed - self._besides))

    def _left(self, most: float) -> float:
        if self.seconds is None:
            return math.inf
        return max(0.0, most * self.seconds - (self._clock() - self._started))
