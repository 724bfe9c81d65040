from __future__ import annotations

import math
import random

import pytest
import torch

from quantkit.evaluation import statistics

VALUES = [random.Random(0).expovariate(2.0) for _ in range(501)]


def _slow_mean(values: list[float]) -> tuple[float, float]:
    total = squares = 0.0
    for value in values:
        total += value
    average = total / len(values)
    for value in values:
        squares += (value - average) ** 2
    return average, math.sqrt(squares / (len(values) - 1) / len(values))


def test_mean_against_a_slow_loop() -> None:
    found = statistics.mean(torch.tensor(VALUES, dtype=torch.float64))
    value, stderr = _slow_mean(VALUES)
    assert found.value == pytest.approx(value, rel=1e-12)
    assert found.stderr == pytest.approx(stderr, rel=1e-12)
    assert found.n == 501


def test_error_of_perplexity_against_resampling() -> None:
    """The delta method against what the error means: the spread over repeated samples."""
    nll = torch.tensor(VALUES, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = nll[torch.randint(501, (4000, 501), generator=generator)].mean(-1).exp()
    assert statistics.perplexity(nll).stderr == pytest.approx(float(draws.std()), rel=0.05)


def test_root_mean_square_by_hand_and_its_error_against_resampling() -> None:
    assert statistics.root_mean_square(torch.tensor([3.0, -4.0])).value == math.sqrt(12.5)
    assert statistics.root_mean_square(torch.zeros(4)).stderr == 0
    values = torch.tensor(VALUES, dtype=torch.float64) - 0.5
    generator = torch.Generator().manual_seed(0)
    draws = values[torch.randint(501, (4000, 501), generator=generator)].square().mean(-1).sqrt()
    found = statistics.root_mean_square(values)
    assert found.stderr == pytest.approx(float(draws.std()), rel=0.05)


def test_proportion_is_the_binomial_error() -> None:
    hits = torch.tensor([True] * 30 + [False] * 10)
    found = statistics.proportion(hits)
    assert (found.value, found.n) == (0.75, 40)
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 39), rel=1e-12)


def test_one_value_has_no_error() -> None:
    assert statistics.mean(torch.tensor([2.0])).stderr is None


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("n", [1, 2, 500, 501])
def test_quantile_against_a_slow_loop(fraction: float, n: int) -> None:
    ordered = sorted(VALUES[:n])
    place = fraction * (n - 1)
    i = int(place)
    expected = ordered[i]
    if i + 1 < n:
        expected += (place - i) * (ordered[i + 1] - ordered[i])
    found = statistics.quantile(torch.tensor(VALUES[:n], dtype=torch.float64), fraction)
    assert found.value == pytest.approx(expected, rel=1e-12)
