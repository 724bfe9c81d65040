"""The tests of pairs: by hand, against scipy, and by simulation."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
import pytest
from scipy import optimize, stats

from quantkit.evaluation import paired
from quantkit.ledger.drift import ALPHA

RUNS = 2000


def _margin(share: float) -> float:
    """Three standard errors of a share over the simulated runs."""
    return 3 * math.sqrt(share * (1 - share) / RUNS)


def test_mcnemar_by_hand_and_against_the_binomial_test() -> None:
    # 1 lost, 8 gained: 2 x (1 + 9) / 2^9.
    assert paired.mcnemar(1, 8) == pytest.approx(20 / 512)
    assert paired.mcnemar(8, 1) == paired.mcnemar(1, 8)
    assert paired.mcnemar(0, 0) == paired.mcnemar(5, 5) == 1
    for lost, gained in ((0, 6), (12, 30), (400, 470)):
        expected = stats.binomtest(lost, lost + gained).pvalue
        assert paired.mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_means_against_scipys_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(3.0, 0.4, 20)
    second = first + rng.normal(0.02, 0.03, 20)
    found = paired.of_means(first.tolist(), second.tolist(), 0.05)
    theirs = stats.ttest_rel(second, first)
    interval = theirs.confidence_interval()
    assert found.value == pytest.approx((second - first).mean())
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    one_sided = [
        stats.ttest_1samp(second - first, 0.05, alternative="less").pvalue,
        stats.ttest_1samp(second - first, -0.05, alternative="greater").pvalue,
    ]
    assert found.p_equivalent == pytest.approx(max(one_sided))


def test_equal_windows_are_no_difference_and_one_window_says_nothing() -> None:
    same = paired.of_means([1.0, 2.0], [1.0, 2.0], 0.01)
    assert (same.value, same.low, same.high, same.p, same.p_equivalent) == (0, 0, 0, 1, 0)
    shifted = paired.of_means([1.0, 2.0], [1.5, 2.5], 0.01)
    assert (shifted.p, shifted.p_equivalent) == (0, 1)
    alone = paired.of_means([1.0], [1.1], 0.01)
    assert (alone.low, alone.p, alone.p_equivalent) == (None, 1, 1)
    assert paired.items_to_decide(alone, 0.01) is None


def test_the_bootstrap_is_that_of_resampled_questions() -> None:
    """Against the slow way: draw questions, one by one."""
    lost, gained, n = 30, 12, 400
    rng = random.Random(0)
    each = [-1] * lost + [1] * gained + [0] * (n - lost - gained)
    draws = sorted(sum(rng.choices(each, k=n)) / n for _ in range(RUNS))
    low, high = paired.bootstrap(lost, gained, n)
    assert low == pytest.approx(draws[round(0.025 * RUNS)], abs=0.004)
    assert high == pytest.approx(draws[round(0.975 * RUNS)], abs=0.004)
    assert paired.bootstrap(lost, gained, n) == (low, high)
    assert paired.bootstrap(0, 0, 300) == (-0.01, 0.01)


def test_tango_by_hand() -> None:
    # Without flips the rate at the limit is the limit's own: z = (0.5 - n d) / sqrt(n d (1 - d)).
    z = (0.5 - 300 * 0.02) / math.sqrt(300 * 0.02 * 0.98)
    assert paired.tango(0, 0, 300, 0.02) == pytest.approx(stats.norm.cdf(z))
    # Many flips: the Wald statistic, (d - limit) / standard error.
    lost, gained, n = 3000, 3100, 100_000
    error = math.sqrt((lost + gained) / n - 0.001**2) / math.sqrt(n)
    wald = stats.norm.cdf((0.001 - 0.003) / error)
    assert paired.tango(lost, gained, n, 0.003) == pytest.approx(wald, rel=0.1)
    assert paired.tango(lost, gained, n, 0.003) == paired.tango(gained, lost, n, 0.003)


@pytest.mark.parametrize(("lost", "gained", "n"), [(1, 0, 44), (12, 9, 282), (40, 20, 1000)])
def test_tango_is_the_score_test_of_the_likeliest_rates(lost: int, gained: int, n: int) -> None:
    """The rate of losses found by maximizing the likelihood, not by Tango's formula."""
    limit = 0.03

    def unlikely(rate: float, lose: int, win: int) -> float:
        rest = math.log(1 - 2 * rate - limit)
        return -(lose * math.log(rate) + win * math.log(rate + limit) + (n - lose - win) * rest)

    tails = []
    for lose, win in ((lost, gained), (gained, lost)):
        best = optimize.minimize_scalar(
            unlikely, bounds=(1e-12, 0.4), args=(lose, win), method="bounded",
            options={"xatol": 1e-12},
        ).x  # fmt: skip
        error = math.sqrt(n * (2 * best + limit - limit**2))
        tails.append(stats.norm.cdf((win - lose - n * limit + 0.5) / error))
    assert paired.tango(lost, gained, n, limit) == pytest.approx(max(tails), rel=1e-4)


@cache
def _answers(lost: int, gained: int, n: int, tolerance: float) -> tuple[float, float]:
    return paired.mcnemar(lost, gained), paired.tango(lost, gained, n, tolerance)


@pytest.mark.parametrize(("n", "flips"), [(282, 0.01), (282, 0.15), (14_042, 0.08)])
def test_no_difference_is_called_one_at_most_5_percent_of_the_time(n: int, flips: float) -> None:
    drawn = np.random.default_rng(n).multinomial(n, [flips / 2, flips / 2, 1 - flips], RUNS)
    called = np.mean([_answers(int(a), int(b), n, 0.01)[0] <= ALPHA for a, b, _ in drawn])
    assert called <= ALPHA + _margin(ALPHA)
    if n > 10_000:  # an exact test is cautious where there are few flips, not where there are many
        assert called >= ALPHA - 0.02


@pytest.mark.parametrize(
    ("n", "flips", "limit"), [(282, 0.0, 0.01), (1000, 0.006, 0.01), (14_042, 0.08, 0.01)]
)
def test_a_change_as_large_as_the_tolerance_is_seldom_called_equivalent(
    n: int, flips: float, limit: float
) -> None:
    shares = [flips / 2 + limit, flips / 2, 1 - flips - limit]
    drawn = np.random.default_rng(n).multinomial(n, shares, RUNS)
    called = np.mean([_answers(int(a), int(b), n, limit)[1] <= ALPHA for a, b, _ in drawn])
    assert called <= ALPHA + _margin(ALPHA)


def test_power_over_questions_is_what_theory_says() -> None:
    """Connor (1987): power of McNemar's test, by the normal approximation."""
    n, lose, gain = 2000, 0.06, 0.04
    drift, flips = lose - gain, lose + gain
    theory = stats.norm.cdf(
        (math.sqrt(n) * drift - 1.96 * math.sqrt(flips)) / math.sqrt(flips - drift**2)
    )
    drawn = np.random.default_rng(1).multinomial(n, [lose, gain, 1 - flips], RUNS)
    power = np.mean([_answers(int(a), int(b), n, 0.01)[0] <= ALPHA for a, b, _ in drawn])
    assert power == pytest.approx(theory, abs=0.04)


@pytest.mark.parametrize("drift", [0.0, 0.003])
def test_power_to_show_equivalence_is_what_theory_says(drift: float) -> None:
    """Two one-sided tests by the normal approximation (Schuirmann 1987)."""
    n, flips, limit = 10_000, 0.08, 0.01
    error = math.sqrt(flips / n)
    z = stats.norm.ppf(1 - ALPHA)
    above, below = ((limit - side) / error - z for side in (drift, -drift))
    theory = stats.norm.cdf(above) + stats.norm.cdf(below) - 1
    shares = [(flips - drift) / 2, (flips + drift) / 2, 1 - flips]
    drawn = np.random.default_rng(5).multinomial(n, shares, RUNS)
    power = np.mean([_answers(int(a), int(b), n, limit)[1] <= ALPHA for a, b, _ in drawn])
    assert 0.5 < theory < 0.99
    assert power == pytest.approx(theory, abs=0.04)


@pytest.mark.parametrize("shift", [0.0, 0.01])
def test_windows_are_told_apart_as_often_as_theory_says(shift: float) -> None:
    """Windows differ far more among themselves than the two models do: it cancels."""
    n, spread = 12, 0.012
    rng = np.random.default_rng(2)
    called, covered = 0, 0
    for _ in range(RUNS):
        first = rng.normal(3.0, 0.4, n)
        second = first + rng.normal(shift, spread, n)
        found = paired.of_means(first.tolist(), second.tolist())
        called += found.p <= ALPHA
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= shift <= found.high
    away, limit = shift * math.sqrt(n) / spread, stats.t.ppf(0.975, n - 1)
    theory = stats.nct.sf(limit, n - 1, away) + stats.nct.cdf(-limit, n - 1, away)
    assert called / RUNS == pytest.approx(theory, abs=_margin(theory))
    assert covered / RUNS == pytest.approx(0.95, abs=_margin(0.95))


def test_as_many_more_questions_as_are_asked_for_do_decide() -> None:
    lose, gain, n = 0.05, 0.03, 300
    seen = paired.of_answers(round(lose * n), round(gain * n), n, 0.01)
    more = paired.items_to_decide(seen, 0.01)
    assert more is not None
    drawn = np.random.default_rng(3).multinomial(n + more, [lose, gain, 1 - lose - gain], RUNS)
    decided = np.mean([min(_answers(int(a), int(b), n + more, 0.01)) <= ALPHA for a, b, _ in drawn])
    assert decided == pytest.approx(paired.POWER, abs=0.05)
    # Sharing one α among 15 comparisons asks for more.
    shared = paired.items_to_decide(seen, 0.01, comparisons=15)
    assert shared is not None
    assert shared > more


def test_no_flip_at_all_still_asks_for_a_number() -> None:
    more = paired.items_to_decide(paired.of_answers(0, 0, 100, 0.01), 0.01)
    assert more is not None
    assert 100 < more < 10_000
    # A difference of exactly the tolerance is on no side, but is seen to be one.
    assert paired.items_to_decide(paired.of_answers(6, 5, 100, 0.01), 0.01) is not None


def test_holm_by_hand_and_its_promise() -> None:
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert paired.holm([]) == []
    assert paired.holm([0.7, 0.9]) == [1, 1]
    rng = np.random.default_rng(4)
    wrong = np.mean([min(paired.holm(list(rng.uniform(size=57)))) <= ALPHA for _ in range(RUNS)])
    assert wrong <= ALPHA + _margin(ALPHA)


def test_groups_are_the_components_of_what_is_not_apart() -> None:
    """Against a slow search: two ids share a group where a chain of such pairs joins them."""
    rng = random.Random(7)
    for _ in range(300):
        values = {str(i): rng.uniform(0, 10) for i in range(8)}
        errors = {id_: rng.choice([0.05, 0.3, 2.0]) for id_ in values}

        def apart(
            a: str, b: str, values: dict[str, float] = values, errors: dict[str, float] = errors
        ) -> bool:
            return abs(values[a] - values[b]) > 2 * math.hypot(errors[a], errors[b])

        expected = {frozenset([id_]) for id_ in values}
        for a in values:
            for b in values:
                if not apart(a, b):
                    both = {group for group in expected if a in group or b in group}
                    expected = (expected - both) | {frozenset().union(*both)}
        found = paired.groups(sorted(values, key=values.__getitem__), apart)
        assert {frozenset(group) for group in found} == expected
        lows = [min(values[id_] for id_ in group) for group in found]
        assert lows == sorted(lows)
