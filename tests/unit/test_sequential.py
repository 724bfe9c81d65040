"""Tests that may be looked at after every question: exactly where it can be done, by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from quantkit.evaluation import paired, sequential
from quantkit.ledger.drift import ALPHA

RUNS = 300
TOLERANCE = 0.01


def _margin(share: float) -> float:
    """Three standard errors of a share over the simulated runs."""
    return 3 * math.sqrt(share * (1 - share) / RUNS)


def _asked(gaps: Sequence[int], comparisons: int = 1, tolerance: float = TOLERANCE) -> int:
    """How many questions are asked."""
    return next(
        end
        for end in sequential.chunk_ends(len(gaps))
        if sequential.is_over(list(gaps[:end]), len(gaps), tolerance, comparisons)
    )


def _verdict(gaps: Sequence[int], comparisons: int = 1) -> tuple[str, int]:
    asked = _asked(gaps, comparisons)
    found = sequential.of_answers(gaps[:asked], len(gaps), TOLERANCE)
    assert found.p_equivalent is not None
    if found.p_equivalent <= ALPHA / comparisons:
        return "equivalent", asked
    return ("different" if found.p <= ALPHA / comparisons else "undecided"), asked


def _set(lost: int, gained: int, n: int) -> NDArray[np.int64]:
    return np.array([-1] * lost + [1] * gained + [0] * (n - lost - gained))


def test_the_capital_is_that_of_a_bettor_who_goes_question_by_question() -> None:
    gaps, mean = [1, 0, -1, 1, 1, 0], 0.03
    stakes = np.geomspace(0.02, 0.95, 12)
    capital = np.ones(len(stakes))
    won = []
    for gap in gaps:
        capital *= 1 - stakes + stakes * (1 + gap) / (1 + mean)
        won.append(capital.mean())
    up, down = np.cumsum(np.equal(gaps, 1)), np.cumsum(np.equal(gaps, -1))
    found = sequential.log_capital(up, down, np.arange(1, 7), mean)
    assert np.exp(found) == pytest.approx(won)
    # A game that is fair on average leaves a bettor on average with what he had.
    fair = [0.3 + mean, 0.3]  # chances of 1 and -1
    one = np.array([1])
    nothing = np.array([0])
    after = [
        math.exp(sequential.log_capital(up, down, one, mean)[0])
        for up, down in ((one, nothing), (nothing, one), (nothing, nothing))
    ]
    assert np.dot([*fair, 1 - sum(fair)], after) == pytest.approx(1)


def _chance_to_cross(flips: int, up_chance: NDArray[np.float64]) -> float:
    """P(p ≤ α at any time) where the (n+1)th flip is a gain with the chance
    ``up_chance[n, gains]``: over all paths, not a sample of them."""
    alive = np.zeros(flips + 1)
    alive[0], crossed = 1.0, 0.0
    for n in range(1, flips + 1):
        gain = up_chance[n - 1]
        moved = alive * (1 - gain)
        moved[1:] += (alive * gain)[:-1]
        ups = np.arange(n + 1)
        pad = np.full(n + 1, n)
        log_e = np.logaddexp(
            sequential.log_capital(ups, pad - ups, pad, 0.0),
            sequential.log_capital(pad - ups, ups, pad, 0.0),
        ) - math.log(2)
        out = np.zeros(flips + 1, dtype=bool)
        out[: n + 1] = log_e >= -math.log(ALPHA)
        crossed += moved[out].sum()
        alive = np.where(out, 0.0, moved)
    return crossed


@pytest.mark.parametrize("flips", [40, 400])
def test_looking_after_every_flip_finds_no_difference_in_5_percent_exactly(flips: int) -> None:
    """Coins, and a set of questions in which exactly half of the flips are gains."""
    coins = _chance_to_cross(flips, np.full((flips, flips + 1), 0.5))
    n, ups = np.mgrid[0:flips, 0 : flips + 1]
    balanced = np.clip((flips / 2 - ups) / (flips - n), 0, 1)
    drawn = _chance_to_cross(flips, balanced)
    assert 0.005 < coins <= ALPHA
    assert drawn <= coins  # without replacement the sums stray less


def test_mcnemar_looked_at_after_every_chunk_would_not_do() -> None:
    """Why all of this: the same looks with the fixed-size test."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(RUNS):
        gaps = rng.choice([-1, 0, 1], 2000, p=[0.05, 0.9, 0.05])
        wrong += any(
            paired.mcnemar(int((gaps[:end] < 0).sum()), int((gaps[:end] > 0).sum())) <= ALPHA
            for end in sequential.chunk_ends(2000)
        )
    assert wrong / RUNS > 2 * ALPHA


def _smallest(drawn: Callable[[], NDArray[np.int64]]) -> NDArray[np.float64]:
    """Both p-values of many sets, at their end: the smallest of all looks, one a question, and of
    the fixed-size test. ``(runs, 2)``"""
    found = []
    for _ in range(RUNS):
        gaps = drawn().tolist()
        one = sequential.of_answers(gaps, len(gaps), TOLERANCE)
        found.append((one.p, one.p_equivalent))
    return np.array(found)


@pytest.mark.parametrize(("flips", "n"), [(40, 282), (160, 2000)])
def test_no_difference_is_called_one_at_most_5_percent_of_the_time(flips: int, n: int) -> None:
    """In a set without a difference, and in questions drawn from a world without one."""
    rng = np.random.default_rng(1)
    fixed = _set(flips // 2, flips // 2, n)
    share = flips / n / 2
    for drawn in (
        lambda: rng.permutation(fixed),
        lambda: rng.choice([-1, 0, 1], n, p=[share, 1 - 2 * share, share]),
    ):
        assert (_smallest(drawn)[:, 0] <= ALPHA).mean() <= ALPHA + _margin(ALPHA)


def test_subjects_that_change_in_opposite_ways_are_no_difference() -> None:
    """Half of the questions are harder for the variant and half easier: shuffled, it cancels."""
    rng = np.random.default_rng(3)

    def drawn() -> NDArray[np.int64]:
        worse = rng.choice([-1, 0], 500, p=[0.08, 0.92])
        better = rng.choice([1, 0], 500, p=[0.08, 0.92])
        return rng.permutation(np.concatenate([worse, better]))

    assert (_smallest(drawn)[:, 0] <= ALPHA).mean() <= ALPHA + _margin(ALPHA)


@pytest.mark.parametrize("flips", [0, 60])
def test_a_change_as_large_as_the_tolerance_is_seldom_called_equivalent(flips: int) -> None:
    rng = np.random.default_rng(2)
    n = 2000
    gaps = _set(flips // 2 + round(TOLERANCE * n), flips // 2, n)
    drawn = _smallest(lambda: rng.permutation(gaps))
    assert (drawn[:, 1] <= ALPHA).mean() <= ALPHA + _margin(ALPHA)
    share = flips / n / 2
    chances = [share + TOLERANCE, 1 - 2 * share - TOLERANCE, share]
    drawn = _smallest(lambda: rng.choice([-1, 0, 1], n, p=chances))
    assert (drawn[:, 1] <= ALPHA).mean() <= ALPHA + _margin(ALPHA)


def test_a_large_difference_is_seen_early_and_sameness_before_the_end() -> None:
    rng = np.random.default_rng(4)
    lost = [_verdict(rng.permutation(_set(300, 20, 2000)).tolist(), 15) for _ in range(15)]
    assert {said for said, _ in lost} == {"different"}
    assert np.mean([asked for _, asked in lost]) < 0.2 * 2000
    same = [_verdict(rng.permutation(_set(20, 20, 14_000)).tolist(), 15) for _ in range(5)]
    assert {said for said, _ in same} == {"equivalent"}
    assert np.mean([asked for _, asked in same]) < 0.4 * 14_000


def test_a_small_difference_that_is_certain_is_still_none_that_matters() -> None:
    """One of 0.6 points, certain long before the end, and surely within 1 when it comes."""
    rng = np.random.default_rng(9)
    gaps = _set(20, 140, 20_000)
    said = [_verdict(rng.permutation(gaps).tolist()) for _ in range(5)]
    assert {verdict for verdict, _ in said} == {"equivalent"}
    for _, asked in said:
        assert asked < 20_000
    # Nobody waits for that where it cannot be: twice as many lost.
    gaps = _set(400, 20, 20_000)
    said = [_verdict(rng.permutation(gaps).tolist()) for _ in range(5)]
    assert {verdict for verdict, _ in said} == {"different"}
    assert np.mean([asked for _, asked in said]) < 0.3 * 20_000


def test_where_all_were_asked_the_fixed_test_has_its_half() -> None:
    gaps = np.random.default_rng(5).permutation(_set(30, 12, 400)).tolist()
    all_asked = sequential.of_answers(gaps, 400, TOLERANCE)
    more_to_come = sequential.of_answers(gaps, 401, TOLERANCE)
    assert all_asked.p == pytest.approx(2 * paired.mcnemar(30, 12))
    assert more_to_come.p > all_asked.p
    assert all_asked.p_equivalent == pytest.approx(min(1, 2 * paired.tango(30, 12, 400, TOLERANCE)))
    assert all_asked.value == pytest.approx(-18 / 400)


def test_what_cannot_be_decided_is_given_up() -> None:
    """282 questions with forty flips show no point of accuracy, and half of them tell so."""
    rng = np.random.default_rng(6)
    found = [_verdict(rng.permutation(_set(20, 20, 282)).tolist(), 15) for _ in range(15)]
    assert {said for said, _ in found} == {"undecided"}
    assert np.mean([asked for _, asked in found]) < 0.75 * 282
    # What is given up would seldom have been decided.
    lost = 0
    for _ in range(100):
        gaps = rng.permutation(_set(45, 25, 282)).tolist()
        asked = _asked(gaps)
        gone_on = sequential.of_answers(gaps, 282, TOLERANCE).p <= ALPHA
        lost += gone_on and sequential.of_answers(gaps[:asked], 282, TOLERANCE).p > ALPHA
    assert lost / 100 <= 2 * sequential.FUTILE


def test_the_chance_to_decide_against_going_on() -> None:
    """With many questions behind, the predicted end is the real one."""
    rng = np.random.default_rng(7)
    lost, gained, n, total = 193, 155, 5000, 5400
    level = ALPHA / 2
    shares = [lost / n, gained / n, 1 - (lost + gained) / n]
    ends = rng.multinomial(total - n, shares, 1000)
    ends = ends[:, :2] + [lost, gained]
    different = np.mean([paired.mcnemar(a, b) <= level for a, b in ends.tolist()])
    equivalent = np.mean([paired.tango(a, b, total, 0.0145) <= level for a, b in ends.tolist()])
    assert 0.1 < different < 0.9
    assert sequential.chances(lost, gained, n, total, 0.001, 1) == pytest.approx(
        (different, 0), abs=0.07
    )
    assert 0.1 < equivalent < 0.9
    found = sequential.chances(lost, gained, n, total, 0.0145, 1)
    assert found[1] == pytest.approx(equivalent, abs=0.07)
    assert found[0] <= 1 - found[1]


def test_the_interval_holds_wherever_one_stops() -> None:
    rng = np.random.default_rng(8)
    shares = [0.06, 0.9, 0.04]
    outside = 0
    for _ in range(RUNS):
        gaps = rng.choice([-1, 0, 1], 500, p=shares).tolist()
        for end in sequential.chunk_ends(500):
            found = sequential.of_answers(gaps[:end], 501, TOLERANCE)
            assert found.low is not None
            assert found.high is not None
            assert found.low < found.value < found.high
            if not found.low <= -0.02 <= found.high:
                outside += 1
                break
    assert outside / RUNS <= ALPHA + _margin(ALPHA)


def test_chunks_grow_and_end_with_the_last_question() -> None:
    assert list(sequential.chunk_ends(282)) == [50, 75, 113, 170, 255, 282]
    assert list(sequential.chunk_ends(20)) == [20]
    assert list(sequential.chunk_ends(50)) == [50]
