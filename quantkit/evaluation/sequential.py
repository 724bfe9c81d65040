"""Verdicts that may be looked at after every question, so that asking stops where one is settled.

A fixed-size test that is read again and again finds a difference sooner or later. Here a bettor
starts with 1 and stakes a part of it on each question in turn; if the hypothesis that is bet
against is true, then no strategy makes the capital reach 1/α, at any time, with a chance of more
than α (Ville's inequality). One over the highest capital so far is therefore a p-value, wherever
one stops (Waudby-Smith and Ramdas 2024, JRSS B 86:1, on bets about bounded means).

**What is guaranteed**, as for the tests of ``paired`` and for the same hypotheses, which are about
questions like these, not about this set of them: where nothing differs, 'different' is said with a
chance of at most α, and where the change is the tolerance or more, 'equivalent' is, over all
looks together. Half of α is for the bets. The other half is kept for the fixed-size test, which is
made when every question was asked and is the sharper one there. The order must be random over all
questions: in the order of a file, or subject by subject, the next question is not like the last.

Betting on the mean of just this set, which shrinks as questions are used up, would settle every
verdict at the latest by the last question, by a difference of one answer. That answers another
question: what a full evaluation would count, not whether the model became worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quantkit.evaluation import paired
from quantkit.evaluation.paired import Difference
from quantkit.ledger.drift import ALPHA

FUTILE = 0.05
"""Where all remaining questions would decide with less than this chance, none is asked."""

_HALVES = 2
"""α is shared by the bets and the fixed-size test at the end."""
_BETS = np.geomspace(0.02, 0.95, 12)
"""Parts of its capital that each of a dozen bettors stakes; their mean is a bettor's too. Small
stakes find small differences and need many questions, large ones large differences soon."""
_FIRST, _GROWTH = 50, 1.5
_DRAWS = 1000

_Counts = NDArray[np.int64]


def chunk_ends(total: int) -> Iterator[int]:
    """After how many of ``total`` questions a verdict is looked for; the last is ``total``.

    Growing: what a chunk costs beside its questions, such as shared prompts computed anew, stays
    in proportion.
    """
    end = _FIRST
    while end < total:
        yield end
        end = math.ceil(end * _GROWTH)
    yield total


def log_capital(up: _Counts, down: _Counts, n: _Counts, mean: float) -> NDArray[np.float64]:
    """ln of the capital that bets on steps in {-1, 0, 1} having a mean above ``mean`` > -1.

    After ``n (t,)`` steps, of which ``up (t,)`` were 1 and ``down (t,)`` -1. Who stakes the part f
    multiplies his capital by 1 - f + f (1 + step)/(1 + mean): on average by at most 1 where the
    mean is ``mean`` or less.
    """
    stakes = _BETS[:, None]
    logs = (
        up * np.log1p(stakes * ((1 - mean) / (1 + mean)))
        + (n - up - down) * np.log1p(stakes * (-mean / (1 + mean)))
        + down * np.log1p(-stakes)
    )
    capital: NDArray[np.float64] = np.logaddexp.reduce(logs, axis=0) - math.log(len(_BETS))
    return capital


def of_answers(gaps: Sequence[int], total: int, tolerance: float) -> Difference:
    """The change of an accuracy by ``gaps``, in the random order in which they came, as a share.

    ``gaps``: 1 where a wrong answer became right, -1 where a right one became wrong, else 0.
    Both p-values hold at any time at which one stops; so does the 95 % interval.
    """
    up, down, seen = _counts(gaps)
    n = len(gaps)
    p = _p_either_way(up, down, seen)
    p_equivalent = max(
        _p_value(log_capital(up, down, seen, -tolerance)),
        _p_value(log_capital(down, up, seen, -tolerance)),
    )
    gained, lost = int(up[-1]), int(down[-1])
    if n == total:
        p = min(p, paired.mcnemar(lost, gained))
        p_equivalent = min(p_equivalent, paired.tango(lost, gained, n, tolerance))
    value = (gained - lost) / n
    return Difference(
        value,
        _lowest(gained, lost, n),
        -_lowest(lost, gained, n),
        min(1.0, _HALVES * p),
        min(1.0, _HALVES * p_equivalent),
        math.sqrt(max(0.0, (gained + lost) / n - value**2)),
        n,
    )


def p_of_no_difference(gaps: Sequence[int]) -> float:
    """p-value of no change, at any time; by the bets alone, which have the whole α."""
    return _p_either_way(*_counts(gaps))


def is_over(gaps: Sequence[int], total: int, tolerance: float, comparisons: int) -> bool:
    """Whether to stop asking: a verdict is settled, or the remaining questions will not settle it.

    A difference that is certain, and might turn out to be within the tolerance, is not settled:
    then it is none that matters. ``comparisons`` share one α; a verdict that is settled alone by α
    over their number stays so when Holm's step-down is applied to all. Giving up early makes no
    verdict wrong, as it only leaves one 'undecided' that the last question might have decided.
    """
    if len(gaps) == total:
        return True
    found = of_answers(gaps, total, tolerance)
    level = ALPHA / comparisons
    if found.p_equivalent is not None and found.p_equivalent <= level:
        return True
    counts = gaps.count(-1), gaps.count(1), len(gaps)
    different, equivalent = chances(*counts, total, tolerance, comparisons)
    if found.p <= level:
        return equivalent < FUTILE
    return different + equivalent < FUTILE


def chances(
    lost: int, gained: int, n: int, total: int, tolerance: float, comparisons: int
) -> tuple[float, float]:
    """Predictive probabilities that the fixed-size tests say 'different', and 'equivalent', once
    all ``total`` are asked.

    The rates of losses and gains are drawn from their posterior under a flat prior, and with them
    the remaining answers (Spiegelhalter et al. 1986, Controlled Clinical Trials 7:8).
    """
    rng = np.random.default_rng(0)
    rates = rng.dirichlet([1 + lost, 1 + gained, 1 + n - lost - gained], _DRAWS)
    ends = rng.multinomial(total - n, rates)[:, :2] + [lost, gained]
    level = ALPHA / comparisons / _HALVES
    p_values = [_fixed(a, b, total, tolerance) for a, b in ends.tolist()]
    equivalent = sum(p_equivalent <= level for _, p_equivalent in p_values)
    decided = sum(min(both) <= level for both in p_values)
    return (decided - equivalent) / _DRAWS, equivalent / _DRAWS


@lru_cache(maxsize=100_000)
def _fixed(lost: int, gained: int, n: int, tolerance: float) -> tuple[float, float]:
    """p-values of the fixed-size tests: of no difference, of one as large as the tolerance."""
    return paired.mcnemar(lost, gained), paired.tango(lost, gained, n, tolerance)


def _counts(gaps: Sequence[int]) -> tuple[_Counts, _Counts, _Counts]:
    """How many were 1, how many -1, and how many there were: after each."""
    steps = np.asarray(gaps, dtype=np.int64)
    return np.cumsum(steps == 1), np.cumsum(steps == -1), np.arange(1, len(steps) + 1)


def _p_either_way(up: _Counts, down: _Counts, n: _Counts) -> float:
    """Half of the capital is bet on each direction."""
    halves = log_capital(up, down, n, 0.0), log_capital(down, up, n, 0.0)
    return _p_value(np.logaddexp(*halves) - math.log(2))


def _p_value(capital: NDArray[np.float64]) -> float:
    """One over the highest capital."""
    return math.exp(-max(0.0, float(capital.max())))


def _lowest(up: int, down: int, n: int) -> float:
    """The smallest mean against which less than 2/α was won: by bisection."""
    counts = np.array([up]), np.array([down]), np.array([n])
    low, high = -1.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        won = float(log_capital(*counts, middle)[0])
        low, high = (middle, high) if won >= math.log(2 / ALPHA) else (low, middle)
    return low
