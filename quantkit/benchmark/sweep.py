"""Which load comes next: until throughput stops growing, and towards the goodput.

Both are fed with readings as they are made, and know nothing of servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantkit.ledger.load import RateReading

MOST_CONCURRENT = 64
"""Where an automatic sweep ends in any case: the server has this many slots."""
_GROWTH = 0.05
"""A level that gains less over the best before it does not count as growth."""
_FLAT_LEVELS = 2
"""This many such levels in a row end the sweep: one alone may be noise."""

_STEP = 2.0
_NARROW = 1.1
"""The search ends when the rate that failed is no more than this times the one that passed."""
_MOST_READINGS = 20
_LOWEST_SHARE = 1 / 32
"""A fraction of the first rate: where even this fails, the objective is out of reach."""


def doubling(
    throughput: Callable[[int], float],
    goes_on: Callable[[], bool] = lambda: True,
    most: int = MOST_CONCURRENT,
) -> list[int]:
    """1, 2, 4 … while ``throughput(level)``, which measures a level, grows and ``goes_on()`` is
    true.

    The sweep ends where two levels in a row each stay below 1.05 times the best before them. One
    noisy level neither ends it early nor hides that growth went on behind it.
    """
    levels: list[int] = []
    best, flat, level = 0.0, 0, 1
    while level <= most and flat < _FLAT_LEVELS and (not levels or goes_on()):
        levels.append(level)
        found = throughput(level)
        flat = 0 if found > (1 + _GROWTH) * best else flat + 1
        best = max(best, found)
        level *= 2
    return levels


Measure = Callable[[float, int], RateReading]
"""The n-th reading, from 0 on, at a rate; it may raise BudgetSpent."""


class BudgetSpent(Exception):
    """There is no time for another reading."""


@dataclass(frozen=True)
class Found:
    """The goodput: ``rate_per_s`` was attained (0: none was), ``above_per_s`` was not (None: none
    that was tried failed)."""

    rate_per_s: float
    above_per_s: float | None
    readings: tuple[RateReading, ...]
    ended: str

    @property
    def at_it(self) -> list[RateReading]:
        """The readings at the goodput itself."""
        return [reading for reading in self.readings if reading.rate_per_s == self.rate_per_s]


class _Search:
    """``needed``: readings in which a rate must pass; one, until some rate has passed by luck."""

    def __init__(self, measure: Measure, share: float) -> None:
        self.readings: list[RateReading] = []
        self.needed = 1
        self._measure = measure
        self._share = share

    def passes(self, rate: float) -> bool:
        """Whether the requests of all readings at this rate together attained the objective; the
        rest of ``needed`` is not made where the first ones fail."""
        while True:
            found = [reading for reading in self.readings if reading.rate_per_s == rate]
            met = pooled(found) >= self._share if found else True
            if not met or len(found) >= self.needed:
                return met
            self.readings.append(self._measure(rate, len(found)))

    def passed_below(self, rate: float) -> float:
        """The highest lower rate that passes; 0 where none does."""
        tried = {reading.rate_per_s for reading in self.readings}
        lower = sorted((one for one in tried if one < rate), reverse=True)
        return next((one for one in lower if self.passes(one)), 0.0)


def goodput(measure: Measure, share: float, first: float, repetitions: int) -> Found:
    """The highest rate at which ``share`` of the requests meet the objective.

    From ``first`` on the rate is doubled or halved until one passes and one fails; the bracket is
    then halved geometrically until it is 10 % wide. Its lower end must hold over ``repetitions``
    readings taken together. A rate that passed by luck becomes the upper end, and from then on
    every rate needs as many readings.
    """
    search = _Search(measure, share)
    low, high, rate = 0.0, math.inf, first
    ended = "even the lowest rate tried missed the objective"
    try:
        while rate >= first * _LOWEST_SHARE:
            if len(search.readings) >= _MOST_READINGS:
                ended = f"after {len(search.readings)} readings, the most allowed"
                break
            if search.passes(rate):
                low = rate
            else:
                high = rate
            if low and high <= low * _NARROW:
                search.needed = repetitions
                if search.passes(low):
                    ended = f"between {low:.3g} and {high:.3g} requests/s, less than 10 % apart"
                    break
                low, high = search.passed_below(low), low
            rate = _between(low, high)
        search.needed = repetitions
        while low and not search.passes(low):
            low, high = search.passed_below(low), low
    except BudgetSpent:
        ended = f"after {len(search.readings)} readings, when the budget was spent"
    return Found(low, None if high == math.inf else high, tuple(search.readings), ended)


def _between(low: float, high: float) -> float:
    """The rate to try next, where ``low`` passed (0: none did) and ``high`` did not (or is ∞)."""
    if not low:
        return high / _STEP
    return low * _STEP if high == math.inf else math.sqrt(low * high)


def pooled(found: Sequence[RateReading]) -> float:
    """Share of the requests of several readings that met the objective."""
    met = sum(reading.attained * reading.requests for reading in found)
    return met / sum(reading.requests for reading in found)
