"""GPTQ against the algorithm written out, and against what it must beat."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import ConversionError
from quantkit.formats.integer_linears import Integers
from quantkit.quantize.gptq import REFIT_DAMPING, gptq, group_order, refit
from quantkit.quantize.rounding import plain_symmetric


def _problem(
    rows: int, columns: int, tokens: int = 512, dead: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and correlated inputs of which some channels are loud, and others always zero."""
    generator = torch.Generator().manual_seed(rows + columns)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (mix + torch.eye(columns))
    x[:, ::17] *= 6
    x[:, list(dead)] = 0
    return torch.randn(rows, columns, generator=generator), x


def _optimal_brain(
    weights: torch.Tensor,
    hessian: torch.Tensor,
    integers: Integers,
    order: list[int],
    damp: float,
) -> torch.Tensor:
    """Round column by column; after each, the exact least-squares update of those to come.

    No Cholesky factor, no lazy batches: the inverse of the Hessian of the remaining columns is
    recomputed for every column (Frantar et al. 2022, equations 2 and 3), in float64.
    """
    W, H = weights.double().clone(), hessian.double().clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = H.diagonal()[~dead].mean()
    H += torch.eye(len(H)) * damp * H.diagonal().mean()
    codes = torch.zeros_like(W)
    for step, column in enumerate(order):
        remaining = order[step:]
        inverse = torch.linalg.inv(H[remaining][:, remaining])
        group = column // integers.group_size
        scale, zero = integers.scales[:, group].double(), integers.zeros[:, group]
        codes[:, column] = ((W[:, column] / scale).round() + zero).clamp(0, 15)
        error = (W[:, column] - (codes[:, column] - zero) * scale) / inverse[0, 0]
        W[:, remaining] -= error[:, None] * inverse[0][None]
    return codes.int()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dead", [(), (0, 40, 41, 95)])
@pytest.mark.parametrize("group_size", [16, 32])
def test_integers_equal_those_of_the_algorithm_written_out(
    group_size: int, dead: tuple[int, ...], symmetric: bool
) -> None:
    weights, x = _problem(12, 96, dead=dead)
    hessian = x.T @ x
    solved = gptq(
        weights, hessian, bits=4, group_size=group_size, dtype=torch.float32, symmetric=symmetric,
        passes=0,
    )  # fmt: skip
    order = group_order(hessian.diagonal(), group_size).tolist()
    assert order != list(range(96))
    assert solved.dead_channels == len(dead)
    integers = solved.integers
    assert symmetric == bool((integers.zeros == 8).all())
    expected = _optimal_brain(weights, hessian, integers, order, solved.damp_percent)
    # float32 against float64: a weight that lies on the edge between two integers may differ.
    assert (integers.codes == expected).float().mean() > 0.99
    scales, zeros = (t.repeat_interleave(group_size, 1) for t in (integers.scales, integers.zeros))
    rounded = ((solved.wanted / scales).round() + zeros).clamp(0, 15)
    assert torch.equal(rounded, integers.codes.float())


def _objective(x: torch.Tensor, damp: float, lost: torch.Tensor) -> torch.Tensor:
    """What GPTQ minimizes, of each row."""
    H = x.double().T @ x.double()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = H.diagonal()[~dead].mean()
    H += torch.eye(len(H)) * damp * H.diagonal().mean()
    return torch.einsum("oi,ij,oj->o", lost.double(), H, lost.double())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, 96])
def test_descent_sets_each_integer_to_the_best_of_all(group_size: int, symmetric: bool) -> None:
    weights, x = _problem(6, 96, dead=(3, 70))
    given = weights, x.T @ x
    options = {"bits": 4, "group_size": group_size, "dtype": torch.float32, "symmetric": symmetric}
    before = gptq(*given, **options, passes=0)
    after = gptq(*given, **options, passes=2)
    scales, zeros = before.integers.scales, before.integers.zeros
    assert torch.equal(after.integers.scales, scales)
    codes = before.integers.codes.clone()
    for _ in range(2):
        for column in group_order(given[1].diagonal(), group_size).tolist():
            tried = []
            for code in range(16):
                codes[:, column] = code
                lost = weights - Integers(codes, scales, zeros).dequantize()
                tried.append(_objective(x, before.damp_percent, lost))
            codes[:, column] = torch.stack(tried).argmin(0)
    assert (after.integers.codes == codes).float().mean() > 0.99
    assert not torch.equal(after.integers.codes, before.integers.codes)


def test_descent_makes_no_row_worse() -> None:
    weights, x = _problem(64, 256)
    options = {"bits": 4, "group_size": 64, "dtype": torch.bfloat16}
    losses = []
    for passes in (0, 1, 2):
        solved = gptq(weights, x.T @ x, **options, passes=passes)
        lost = weights - solved.integers.dequantize()
        losses.append(_objective(x, solved.damp_percent, lost))
    assert (losses[1] <= losses[0] * (1 + 1e-6)).all()
    assert (losses[2] <= losses[1] * (1 + 1e-6)).all()
    assert losses[2].sum() < 0.98 * losses[0].sum()


@pytest.mark.parametrize("group_size", [64, 128, 256])
def test_output_error_is_far_below_rounding_to_nearest(group_size: int) -> None:
    weights, x = _problem(64, 256)
    solved = gptq(weights, x.T @ x, bits=4, group_size=group_size, dtype=torch.bfloat16)
    plain = plain_symmetric(weights, 4, group_size, torch.bfloat16)

    def error(approximation: torch.Tensor) -> float:
        return float((x @ (weights - approximation).T).square().sum())

    assert error(solved.integers.dequantize()) < 0.5 * error(plain.dequantize())
    assert solved.integers.scales.shape == (64, 256 // group_size)


def test_groups_are_ordered_whole_and_inside_by_importance() -> None:
    importance = torch.tensor([1.0, 5, 2, 9, 8, 3])
    assert group_order(importance, 2).tolist() == [3, 2, 4, 5, 1, 0]


def test_dead_channels_are_counted_and_harmless() -> None:
    weights, x = _problem(8, 64)
    x[:, 5] = 0
    solved = gptq(weights, x.T @ x, bits=4, group_size=32, dtype=torch.float32)
    assert solved.dead_channels == 1
    assert torch.isfinite(solved.integers.dequantize()).all()


def test_a_singular_hessian_is_damped_until_it_works() -> None:
    weights, _ = _problem(8, 64)
    x = torch.ones(4, 64)
    solved = gptq(weights, x.T @ x, bits=4, group_size=32, dtype=torch.float32, damp_percent=1e-10)
    assert solved.damp_percent > 1e-10


def test_non_finite_activations_are_refused() -> None:
    weights, x = _problem(8, 64)
    x[0, 0] = float("nan")
    with pytest.raises(ConversionError, match="not finite"):
        gptq(weights, x.T @ x, bits=4, group_size=32, dtype=torch.float32)


def test_refitted_weights_are_the_damped_least_squares_on_the_other_input() -> None:
    weights, exact = _problem(8, 48)
    x = exact + 0.3 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))
    hessian = x.T @ x
    refitted = refit(weights, hessian, weights @ (exact - x).T @ x, tokens=480)
    # The damping as rows of their own: each pulls one weight to where it was.
    pull = (REFIT_DAMPING * 0.1 * hessian.diagonal().mean()).sqrt() * torch.eye(48)
    rows = torch.cat([x, pull]).double()
    wanted = torch.cat([exact @ weights.T, pull @ weights.T]).double()
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(refitted.double(), expected, rtol=1e-4, atol=1e-4)

    def error(candidate: torch.Tensor) -> float:
        return float((x @ candidate.T - exact @ weights.T).square().sum())

    assert error(refitted) < error(weights)


def test_weights_stay_where_the_input_is_the_sources() -> None:
    weights, x = _problem(8, 48)
    hessian = x.T @ x
    assert torch.equal(refit(weights, hessian, torch.zeros_like(weights), 512), weights)
