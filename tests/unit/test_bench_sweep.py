"""Sweeps and searches over servers that are simulated, whose limits are known."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import mean

import pytest

from quantkit.benchmark.sweep import Found, doubling, goodput
from quantkit.ledger.load import RateReading


def saturating(level: int) -> float:
    """Throughput that doubles up to 8 and is flat from there."""
    return 100.0 * min(level, 8)


def test_a_sweep_ends_two_levels_after_the_last_growth() -> None:
    asked: list[int] = []

    def throughput(level: int) -> float:
        asked.append(level)
        return saturating(level)

    assert doubling(throughput) == [1, 2, 4, 8, 16, 32]
    assert asked == [1, 2, 4, 8, 16, 32]


def test_one_noisy_level_does_not_end_a_sweep() -> None:
    def throughput(level: int) -> float:
        return 0.5 * saturating(level) if level == 4 else saturating(level)

    assert doubling(throughput) == [1, 2, 4, 8, 16, 32]


def test_slow_growth_is_none_and_the_slots_are_the_limit() -> None:
    assert doubling(lambda level: 100.0 + level) == [1, 2, 4]
    assert doubling(lambda level: float(level), most=16) == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_a_sweep_reaches_the_level_of_saturation(noise: float) -> None:
    generator = random.Random(1)
    for _ in range(200):
        levels = doubling(lambda n: saturating(n) * generator.gauss(1, noise))
        assert 8 in levels
        assert max(levels) <= 64


def reading(rate: float, attained: float, requests: int = 1000) -> RateReading:
    return RateReading(
        rate_per_s=rate, requests=requests, attained=attained, output_tokens_per_s=rate * 10
    )


def search(attained: Callable[[float], float], first: float = 1.0, repetitions: int = 3) -> Found:
    return goodput(lambda rate, _: reading(rate, attained(rate)), 0.95, first, repetitions)


@pytest.mark.parametrize("capacity", [0.07, 0.5, 1.0, 3.3, 40.0])
def test_a_sharp_limit_is_found_within_a_tenth(capacity: float) -> None:
    found = search(lambda rate: 1.0 if rate <= capacity else 0.2)
    assert found.rate_per_s <= capacity < (found.above_per_s or 0)
    assert (found.above_per_s or 0) <= 1.1 * found.rate_per_s
    assert len(found.at_it) == 3
    assert "less than 10 % apart" in found.ended


def test_an_objective_out_of_reach() -> None:
    found = search(lambda _: 0.9)
    assert found.rate_per_s == 0.0
    assert found.at_it == []
    assert found.above_per_s is not None
    assert "even the lowest rate" in found.ended


def test_a_search_that_never_fails_ends_all_the_same() -> None:
    found = search(lambda _: 1.0)
    assert found.above_per_s is None
    assert found.rate_per_s == pytest.approx(2.0**19)
    assert "the most" in found.ended


def test_a_rate_that_passed_by_luck_is_not_the_goodput() -> None:
    """At 2/s the first reading passes and all others miss; what holds lies below."""

    def measure(rate: float, repetition: int) -> RateReading:
        lucky = rate < 2.5 and repetition == 0
        return reading(rate, 1.0 if rate <= 1.5 or lucky else 0.5)

    found = goodput(measure, 0.95, 2.0, 3)
    assert 1.3 < found.rate_per_s <= 1.5
    assert all(one.attained == 1.0 for one in found.at_it)


def attained_by_queue(rate: float, service: float, limit: float, count: int, seed: int) -> float:
    """Share of Poisson arrivals that a server, which takes ``service`` s for each, one at a time,
    begins within ``limit`` s."""
    generator, now, free, met = random.Random(seed), 0.0, 0.0, 0
    for _ in range(count):
        now += generator.expovariate(rate)
        start = max(now, free)
        free = start + service
        met += start - now <= limit
    return met / count


def test_the_goodput_of_a_queue_is_that_of_theory() -> None:
    """M/D/1: a long simulation says which rate attains it, short readings must come near it."""
    exact = max(
        rate / 100
        for rate in range(5, 100)
        if attained_by_queue(rate / 100, 1.0, 2.0, 200_000, 7) >= 0.95
    )
    found = [
        goodput(
            lambda rate, n, run=run: reading(
                rate, attained_by_queue(rate, 1.0, 2.0, 400, hash((rate, n, run))), 400
            ),
            0.95,
            0.5,
            3,
        ).rate_per_s
        for run in range(20)
    ]
    assert mean(found) == pytest.approx(exact, rel=0.1)
    assert all(0.7 * exact < rate < 1.3 * exact for rate in found)
