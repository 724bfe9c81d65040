"""GPTQ: round one column after another and let the columns still to come make up for it.

Frantar et al. 2022, arXiv 2210.17323. Columns are taken in the order of their activations, which
matters much for quality, yet without a stored permutation: whole groups are ordered, and columns
inside each group, so that every group stays contiguous in the file (desc_act false).
Coordinate descent follows (``quantize/descent.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.errors import ConversionError
from quantkit.formats.integer_linears import Integers
from quantkit.quantize.descent import descend, descend_columns
from quantkit.quantize.inputs import dead_channels
from quantkit.quantize.replay import replayed
from quantkit.quantize.rounding import asymmetric_scales, symmetric_scales

_LAZY_COLUMNS = 128
_DAMPING_TRIES = 8
REFIT_DAMPING = 32.0
"""The refit's damping, in mean diagonals of the Hessian: this times input channels per token. With
2 all text loses more, and most what is not like the calibration's (tests/benchmarks/RESULTS.md)."""
DAMP_PERCENT = 0.5
"""The fraction of the mean diagonal that is added before the Hessian is inverted. The usual 0.01 is
better on no text, and much worse on text unlike the calibration's (tests/benchmarks/RESULTS.md)."""
_SEARCH_DAMPING = 0.01
"""A fraction of the mean diagonal, for expected losses: enough for the Cholesky factor to exist."""
PASSES = 2
"""Passes of coordinate descent. The second gives a third of what the first does, the third next to
nothing (tests/benchmarks/RESULTS.md)."""


@dataclass(frozen=True)
class Solved:
    """The integers, and what solving met."""

    integers: Integers
    wanted: torch.Tensor
    """(out, in) float32: what was rounded to the integers, each weight with what it makes up for
    of the others' errors."""
    damp_percent: float
    """The damping that made the Hessian invertible."""
    dead_channels: int
    """Input channels that were zero on every calibration token."""


class Kernels:
    """The two inner steps; on a GPU, where they are many small launches, recorded once and
    replayed for every group of the same shape."""

    def __init__(self) -> None:
        self.symmetric = replayed(symmetric_scales)
        self.asymmetric = replayed(asymmetric_scales)
        self.round_columns = replayed(round_columns)
        self.descend_columns = replayed(descend_columns)


def gptq(
    weights: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    symmetric: bool = True,
    damp_percent: float = DAMP_PERCENT,
    passes: int = PASSES,
    kernels: Kernels | None = None,
) -> Solved:
    """Quantize one linear, minimizing ‖X (W - Ŵ)ᵀ‖² for hessian = XᵀX.

    ``weights``: (out, in) float32; ``hessian``: (in, in) float32 or float64; ``group_size``
    divides in; ``dtype``: the model's, in which engines hold the scales; ``symmetric``: whether all
    zeros are 2**(bits-1); ``passes``: of coordinate descent. Several linears with the same input
    may be stacked along out. No more than three matrices of the Hessian's size exist at a time,
    itself among them. Raise ConversionError for a Hessian with non-finite entries, or one
    that no damping makes invertible.
    """
    kernels = kernels or Kernels()
    # Its diagonal bounds a sum of squares: XᵀX is finite where the diagonal is.
    importance = hessian.diagonal().clone()
    dead_count = dead_channels(importance, "gptq")
    dead = importance == 0
    order = group_order(importance, group_size)
    # A channel that was always zero may take any integer; as likely as the others it rounds well.
    diagonal = importance.masked_fill(dead, importance[~dead].mean() if (~dead).any() else 1.0)
    inverse, damping = _inverse_factor(_permuted(hessian, diagonal, order.flip(0)), damp_percent)
    importance = importance[order].float()

    # Columns lie as rows, so that what belongs to one column is contiguous.
    W = weights.T.index_select(0, order).float()
    columns, rows = W.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=W.device)
    scales = W.new_empty(columns // group_size, rows)
    zeros = torch.full_like(scales, 1 << (bits - 1))
    lazy = min(group_size, _LAZY_COLUMNS)
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        if start % group_size == 0:
            group, number = slice(start, start + group_size), start // group_size
            given = W[group], bits, importance[group, None], dtype
            if symmetric:
                search = kernels.symmetric if group_size == lazy else symmetric_scales
                scales[number] = search(*given)
            else:
                search = kernels.asymmetric if group_size == lazy else asymmetric_scales
                scales[number], zeros[number] = search(*given)
        part = inverse[start:stop, start:stop]
        rounded, errors, whole = kernels.round_columns(
            W[start:stop], part, scales[number], zeros[number], (1 << bits) - 1
        )
        codes[start:stop], W[start:stop] = rounded, whole
        W[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1)

    del inverse
    if passes:
        del W
        H = _permuted(hessian, diagonal + damping * diagonal.mean(), order).float()
        codes, W = descend(
            weights.T.index_select(0, order).float(), H, codes, scales, zeros,
            top=(1 << bits) - 1, passes=passes, step=kernels.descend_columns,
        )  # fmt: skip
    back = order.argsort()
    groups = (order[::group_size] // group_size).argsort()
    integers = Integers(
        codes[back].T.contiguous(),
        scales[groups].T.contiguous(),
        zeros[groups].T.contiguous().int(),
    )
    return Solved(integers, W[back].T.contiguous(), damping, dead_count)


def refit(
    weights: torch.Tensor, hessian: torch.Tensor, lacking: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Weights (out, in) that make up for what the output lacks before anything is rounded: damped
    least squares.

    ``hessian``: XᵀX; ``lacking``: EᵀX (out, in), E the source's output less the one on X; both
    over so many ``tokens``. Li et al. 2025, GPTAQ (arXiv 2504.02692), has the same aim for
    a linear's own output, and lets each column of GPTQ do its part of it.
    """
    damped = hessian.clone()
    damping = REFIT_DAMPING * len(hessian) / tokens
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return weights  # gptq() finds out what is wrong with this Hessian
    return weights + torch.cholesky_solve(lacking.T, factor).T.to(weights.dtype)


def round_columns(
    weights: torch.Tensor,
    inverse: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    top: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round columns in turn; those after each one make up for its error.

    ``weights``: (columns, out); ``inverse``: their square of the inverse Hessian's factor;
    ``scale`` and ``zero``: (out,). Returns the codes in [0, top], uint8, the errors divided by the
    factor's diagonal, and what was rounded, all (columns, out).
    """
    left = weights.clone()
    codes = torch.empty_like(left)
    errors = torch.empty_like(left)
    for j, column in enumerate(left):
        code = torch.div(column, scale, out=codes[j]).round_().add_(zero).clamp_(0, top)
        error = torch.addcmul(column, code - zero, scale, value=-1, out=errors[j])
        error.div_(inverse[j, j])
        left[j + 1 :].addr_(inverse[j, j + 1 :], error, alpha=-1)
    return codes.byte(), errors, left


def group_order(importance: torch.Tensor, group_size: int) -> torch.Tensor:
    """Columns by falling importance, groups by their largest and then inside each group: (in,)."""
    grouped = importance.view(-1, group_size)
    groups = grouped.amax(1).argsort(descending=True, stable=True)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    return (groups[:, None] * group_size + inside[groups]).flatten()


def remaining_variances(hessian: torch.Tensor) -> torch.Tensor:
    """What the squared error of each column weighs when the columns after it make up for it: (in,).

    ``hessian``: XᵀX (in, in). With columns in the order of their rounding this is the diagonal of D
    in H = U D Uᵀ, U upper triangular with ones on its diagonal: what later channels do not explain.
    """
    diagonal = hessian.diagonal()
    order = diagonal.argsort()  # the reverse of GPTQ's
    added = _SEARCH_DAMPING * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(_permuted(hessian, diagonal + added, order))
    if failed:
        return diagonal.clone()  # gptq() finds out what is wrong with this Hessian
    found: torch.Tensor = factor.diagonal().square()[order.argsort()]
    return found


def _permuted(hessian: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A copy with rows and columns in this order, and another diagonal, given in the old one."""
    found = hessian.index_select(0, order).index_select(1, order)
    found.diagonal().copy_(diagonal[order])
    return found


def _inverse_factor(hessian: torch.Tensor, damp_percent: float) -> tuple[torch.Tensor, float]:
    """U, upper triangular, with UᵀU the inverse of the damped Hessian; and the damping it took.

    ``hessian``, whose memory is used up, has its rows and columns in reverse: of its Cholesky
    factor L, the inverse in reverse is U (float32). One factorization does, and H⁻¹ never exists.
    """
    mean, added = hessian.diagonal().mean(), 0.0
    for _ in range(_DAMPING_TRIES):
        hessian.diagonal().add_((damp_percent - added) * mean)
        added = damp_percent
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed and torch.isfinite(1 / factor.diagonal()).all():
            # Transposed, the layout that the solver works in.
            inverse = hessian.zero_().fill_diagonal_(1).T
            torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
            del factor
            return inverse.float().flip(0, 1), damp_percent
        damp_percent *= 10
    raise ConversionError(
        f"gptq: the Hessian is singular even with damping {damp_percent:.2f}; use more or longer "
        "calibration samples"
    )
