from __future__ import annotations

import math

import pytest
import torch

from quantkit.evaluate.divergence import score


def test_by_hand() -> None:
    # D(p ‖ q) of p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2) is 1/2 ln 2 - 1/4 ln 2 = ln 2 / 4.
    p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[0.25, 0.25, 0.5]]).log() + 7  # a constant does not matter
    values = score(q, torch.tensor([0]), p)
    assert values.kld is not None
    assert values.same_top is not None
    assert values.kld[0].item() == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert values.nll[0].item() == pytest.approx(math.log(4), rel=1e-6)
    assert values.same_top.tolist() == [False]


def test_of_a_distribution_from_itself_is_exactly_zero() -> None:
    logits = torch.randn(300, 5000, generator=torch.Generator().manual_seed(0)) * 4
    values = score(logits, torch.zeros(300, dtype=torch.long), logits.clone())
    assert values.kld is not None
    assert values.same_top is not None
    assert values.kld.abs().max() == 0
    assert values.same_top.all()


@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_agrees_with_float64(noise: float) -> None:
    """To 3e-8 nats: float32 normalisers (ln Σ near 40 here) would be wrong by 1e-6."""
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(70, 20000, generator=generator) * 3 + 20
    q = p + torch.randn(p.shape, generator=generator) * noise
    targets = torch.randint(20000, (70,), generator=generator)
    values = score(q, targets, p)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kld = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert values.kld is not None
    torch.testing.assert_close(values.kld, kld, rtol=1e-5, atol=3e-8)
    torch.testing.assert_close(values.nll, -log_q[range(70), targets], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_positions_are_counted_in_either_model(bad: float) -> None:
    good = torch.zeros(200, 10)
    damaged = good.clone()
    damaged[[3, 64, 199], 5] = bad
    targets = torch.zeros(200, dtype=torch.long)
    assert score(damaged, targets, good).non_finite == 3
    assert score(good, targets, damaged).non_finite == 3
    assert score(damaged, targets).non_finite == 3
    assert score(good, targets, good).non_finite == 0
