"""Axes: from values to pixels, with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.reports.format import fixed, number


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in pixels, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Scale:
    """Values in ``[low, high]`` on pixels from ``start`` to ``end``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixels; values outside are held at the ends."""
        held = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(held / self.low) / math.log(self.high / self.low)
        else:
            share = (held - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, most: int) -> list[Tick]:
        """At most about ``most`` ticks at round numbers."""
        return self._log_ticks(most) if self.log else self._linear_ticks(most)

    def _linear_ticks(self, most: int) -> list[Tick]:
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        if round(step, decimals) != step:  # 2.5 and its likes have one place more
            decimals += 1
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        values = [index * step for index in range(first, last + 1)]
        return [Tick(self(value), fixed(value + 0.0, decimals)) for value in values]

    def _log_ticks(self, most: int) -> list[Tick]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for multiples in ((1, 2, 5), (1, 3), (1,)):
            values = [
                multiple * 10.0**power
                for power in range(first, last + 1)
                for multiple in multiples
                if self.low <= multiple * 10.0**power <= self.high
            ]
            if len(values) <= most:
                break
        stride = math.ceil(len(values) / most)
        return [Tick(self(value), number(value, 1)) for value in values[::stride]]


def from_zero(values: Sequence[float], start: float, end: float) -> Scale:
    """Linear from 0 to a little above the greatest value."""
    return Scale(0.0, (max(values, default=0.0) or 1.0) * 1.06, start, end)


def around(values: Sequence[float], start: float, end: float) -> Scale:
    """Linear over all values with a margin at both ends."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or 1.0
    return Scale(low - margin, high + margin, start, end)


def logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """Logarithmic over all positive values with a margin at both ends."""
    positive = [value for value in values if value > 0] or [1.0]
    return Scale(min(positive) / 1.7, max(positive) * 1.7, start, end, log=True)
