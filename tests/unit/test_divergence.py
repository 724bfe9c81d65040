from __future__ import annotations

import math

import pytest
import torch

from quantkit.evaluation.divergence import TOP, delta_p, score


def test_by_hand() -> None:
    # D(p ‖ q) of p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2) is 1/2 ln 2 - 1/4 ln 2 = ln 2 / 4.
    p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[0.25, 0.25, 0.5]]).log() + 7  # a constant does not matter
    values = score(q, torch.tensor([0]), p)
    assert values.drift is not None
    assert values.drift.kld[0].item() == pytest.approx(math.log(2) / 4, rel=1e-6)
    assert values.nll[0].item() == pytest.approx(math.log(4), rel=1e-6)
    assert values.drift.same_top.tolist() == [False]
    # The true token, 0, had 1/2 and has 1/4; each model's own favourite has 1/2.
    assert delta_p(values)[0].item() == pytest.approx(-0.25, rel=1e-6)
    assert values.drift.reference_nll[0].item() == pytest.approx(math.log(2), rel=1e-6)
    assert (values.drift.top.item(), values.drift.reference_top.item()) == (2, 0)
    assert values.drift.confidence[0].item() == pytest.approx(0.5, rel=1e-6)
    assert values.drift.reference_confidence[0].item() == pytest.approx(0.5, rel=1e-6)


def test_of_a_distribution_from_itself_is_exactly_zero() -> None:
    logits = torch.randn(300, 5000, generator=torch.Generator().manual_seed(0)) * 4
    values = score(logits, torch.zeros(300, dtype=torch.long), logits.clone())
    assert values.drift is not None
    assert values.drift.kld.abs().max() == 0
    assert values.drift.same_top.all()


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
    assert values.drift is not None
    torch.testing.assert_close(values.drift.kld, kld, rtol=1e-5, atol=3e-8)
    torch.testing.assert_close(values.nll, -log_q[range(70), targets], rtol=0, atol=1e-6)


def test_what_is_said_of_the_likeliest_tokens_against_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(70, 500, generator=generator) * 3
    q = p + torch.randn(p.shape, generator=generator)
    drift = score(q, torch.zeros(70, dtype=torch.long), p).drift
    assert drift is not None
    for row in range(70):
        one, other = (x[row].double().softmax(-1).tolist() for x in (p, q))
        best, likeliest = (sorted(range(500), key=lambda i, x=x: -x[i]) for x in (one, other))
        assert (drift.reference_top[row], drift.top[row]) == (best[0], likeliest[0])
        assert drift.reference_confidence[row].item() == pytest.approx(one[best[0]], rel=1e-5)
        assert drift.confidence[row].item() == pytest.approx(other[likeliest[0]], rel=1e-5)
        shared = len(set(best[:TOP]) & set(likeliest[:TOP])) / TOP
        assert drift.shared_top[row].item() == pytest.approx(shared)
    assert 0 < drift.shared_top.mean() < 1


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
