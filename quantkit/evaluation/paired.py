"""Tests of two models that answered the same questions and read the same windows.

What the two have in common, how hard each question or window is, cancels in the differences:
that is why a pair is told apart by far less than the errors of the two numbers would allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from quantkit.ledger.drift import ALPHA

POWER = 0.8
"""The chance with which the number of further questions would decide."""
_BOOTSTRAPS = 10_000
_MOST = 10_000_000
"""More questions than this are as good as never."""


@dataclass(frozen=True)
class Difference:
    """The second of a pair minus the first.

    ``low`` and ``high``: a 95 % interval, None for a single window. ``p``: of no difference at
    all. ``p_equivalent``: of a difference as large as the tolerance; None without a tolerance.
    ``deviation``: the standard deviation of one item's difference; ``n``: items.
    """

    value: float
    low: float | None
    high: float | None
    p: float
    p_equivalent: float | None
    deviation: float
    n: int


def of_means(
    first: Sequence[float], second: Sequence[float], tolerance: float | None = None
) -> Difference:
    """Paired t-test over items (windows), with two one-sided t-tests against ``tolerance``."""
    gaps = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    n, value = len(gaps), float(gaps.mean())
    if n < 2:
        return Difference(value, None, None, 1.0, None if tolerance is None else 1.0, 0.0, n)
    deviation = float(gaps.std(ddof=1))
    error, freedom = deviation / math.sqrt(n), n - 1
    half = float(special.stdtrit(freedom, 1 - ALPHA / 2)) * error
    outside = None
    if tolerance is not None:
        outside = _t_tail((tolerance - abs(value)), error, freedom)
    return Difference(
        value,
        value - half,
        value + half,
        min(1.0, 2 * _t_tail(abs(value), error, freedom)),
        outside,
        deviation,
        n,
    )


def of_answers(lost: int, gained: int, n: int, tolerance: float, seed: int = 0) -> Difference:
    """The change of an accuracy over ``n`` questions, as a share.

    ``lost``: right in the first and wrong in the second; ``gained``: the other way round. Exact
    McNemar test, bootstrap interval, Tango's test of equivalence.
    """
    value = (gained - lost) / n
    low, high = bootstrap(lost, gained, n, seed)
    deviation = math.sqrt(max(0.0, (gained + lost) / n - value**2))
    return Difference(
        value, low, high, mcnemar(lost, gained), tango(lost, gained, n, tolerance), deviation, n
    )


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value: of the answers that flipped, half should have flipped each way."""
    flips = lost + gained
    return min(1.0, 2 * float(special.bdtr(min(lost, gained), flips, 0.5))) if flips else 1.0


def bootstrap(lost: int, gained: int, n: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of (gained - lost)/n over resampled questions.

    Drawing ``n`` questions with replacement draws how many of each kind: one multinomial. Without
    any flip every sample is the same; then both ends are the rule of three's, 3/n.
    """
    if not lost + gained:
        return -min(1.0, 3 / n), min(1.0, 3 / n)
    shares = [lost / n, gained / n, 1 - (lost + gained) / n]
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=_BOOTSTRAPS)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / n, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def tango(lost: int, gained: int, n: int, tolerance: float) -> float:
    """p-value against an accuracy that changed by ``tolerance`` or more, either way.

    The larger of two one-sided score tests for paired proportions (Tango 1998, Statistics in
    Medicine 17:891), each with a continuity correction, which keeps them below their level where
    flips are few; their errors stay right where none was seen.
    """
    return max(_beyond(lost, gained, n, tolerance), _beyond(gained, lost, n, tolerance))


def _beyond(lost: int, gained: int, n: int, limit: float) -> float:
    """One-sided p-value of (gained - lost)/n ≥ ``limit`` > 0, given that it was seen below."""
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * limit
    c = -lost * limit * (1 - limit)
    # The most likely rate of losses, were the difference exactly the limit.
    rate = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    error = math.sqrt(n * (2 * rate + limit * (1 - limit)))
    z = (gained - lost - n * limit + 0.5) / error
    return float(special.ndtr(z))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values such that any at most α is wrong at most α of the time, over all together.

    Holm's step-down: valid however the tests depend on each other, and never weaker than
    Bonferroni's.
    """
    adjusted, floor = [1.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, index in enumerate(order):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def items_to_decide(
    difference: Difference, tolerance: float | None, comparisons: int = 1
) -> int | None:
    """How many further items would decide, if they are like those seen; None: out of reach.

    With the chance ``POWER``, by the cheaper of both ways: show the difference, or show that it
    is within ``tolerance``. ``comparisons`` share one α.
    """
    if difference.n < 2:
        return None
    alpha, power = ALPHA / comparisons, float(special.ndtri(POWER))
    ways = [(abs(difference.value), 1 - alpha / 2)]
    if tolerance is not None:
        ways.append((tolerance - abs(difference.value), 1 - alpha))
    # One flip more than was seen: where there was none, the deviation is not 0.
    deviation = math.sqrt(difference.deviation**2 + (difference.deviation == 0) / difference.n)
    needed = [
        ((float(special.ndtri(level)) + power) * deviation / distance) ** 2
        for distance, level in ways
        if distance > 0
    ]
    least = min(needed, default=math.inf)
    return max(1, math.ceil(least) - difference.n) if least < _MOST else None


def groups(ids: Sequence[str], apart: Callable[[str, str], bool]) -> list[list[str]]:
    """``ids``, ordered by value, in groups of which any two members of different ones are apart.

    Within a group nothing is ranked: its members hang together by pairs that are not apart.
    """
    found: list[list[str]] = []
    for id_ in ids:
        group = [id_]
        # With unequal errors a far value can touch a group that a nearer one does not.
        while found and any(not apart(a, b) for earlier in found for a in earlier for b in group):
            group = found.pop() + group
        found.append(group)
    return found


def _t_tail(distance: float, error: float, freedom: int) -> float:
    """P(T > distance / error); with no error at all 0, 1/2 or 1."""
    t = distance / error if error else math.copysign(math.inf, distance) if distance else 0.0
    return float(special.stdtr(freedom, -t))
