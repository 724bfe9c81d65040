"""A measured value and how far it can be trusted: what a ledger leaves open of each number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

from quantkit.ledger.drift import ALPHA

ONE_RUN = 0.10
"""Fewer than three repetitions show no error: below a tenth, differences are not ranked."""
ONE_START = 0.04
"""Repetitions share one start of the server and one hour of the machine: however well they agree,
below this differences are not ranked."""
_Z95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A value with both ends of its 95 % interval; an end may be infinite."""

    value: float
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Interval:
        """A value that has no error, such as the reference's drift from itself."""
        return cls(value, value, value)

    @property
    def finite(self) -> bool:
        """Whether the value is a number; its ends need not be."""
        return math.isfinite(self.value)

    def overlaps(self, other: Interval) -> bool:
        """Whether the two have a point in common: then neither counts as the larger."""
        return self.low <= other.high and other.low <= self.high

    def over(self, other: Interval) -> Interval:
        """The ratio of two positive values: 1 is outside where the two do not overlap."""
        return Interval(
            _ratio(self.value, other.value),
            _ratio(self.low, other.high),
            _ratio(self.high, other.low),
        )


def of_repetitions(values: Sequence[float]) -> Interval:
    """The median of positive values: Student's t over three and more, and never less than
    ``ONE_START``; of fewer their range, widened by ``ONE_RUN``."""
    if not all(map(math.isfinite, values)):
        return Interval.exactly(math.nan)
    middle = statistics.median(values)
    if len(values) < 3:
        wide = _half(ONE_RUN)
        return Interval(middle, min(values) * (1 - wide), max(values) * (1 + wide))
    error = statistics.stdev(values) / math.sqrt(len(values))
    t = float(special.stdtrit(len(values) - 1, 1 - ALPHA / 2))
    half = max(t * error, middle * _half(ONE_START))
    return Interval(middle, max(0.0, middle - half), middle + half)


def of_error(value: float, stderr: float | None) -> Interval:
    """The interval of a standard error; the value alone where there is none."""
    half = _Z95 * (stderr or 0.0)
    return Interval(value, value - half, value + half)


def _half(margin: float) -> float:
    """Half the width at which two intervals touch where one value is ``margin`` below the other."""
    return margin / (2 - margin)


def _ratio(a: float, b: float) -> float:
    if b > 0:
        return 0.0 if math.isinf(b) else a / b
    return math.inf
