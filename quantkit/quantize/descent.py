"""Coordinate descent on integers: each in turn is set to its best, all others as they are.

Behdin et al. 2023, QuantEase (arXiv 2309.01885). GPTQ decides on a column when those after it are
not rounded yet; here every column is decided on again, now that all others are known. The scales
stay. Every step lessens what GPTQ minimizes, or leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_LAZY_COLUMNS = 128


def descend(
    weights: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    *,
    top: int,
    passes: int,
    step: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimize tr((W - Ŵ)ᵀ H (W - Ŵ)) over the integers in [0, top].

    Columns lie as rows: ``weights`` and ``codes`` (uint8) are (in, out), ``scales`` and ``zeros``
    (groups, out), ``hessian`` (in, in) float32, damped. ``step`` is ``descend_columns``. Returns
    the codes, and what each was rounded from in the last of the ``passes``, (in, out) float32, in
    the memory of ``weights``.
    """
    columns, groups = len(weights), len(scales)
    size = columns // groups
    lazy = min(size, _LAZY_COLUMNS)
    codes, values = codes.clone(), codes.float()
    values.view(groups, size, -1).sub_(zeros[:, None]).mul_(scales[:, None])
    slope = hessian @ weights.sub_(values)
    wanted = weights
    for _ in range(passes):
        for start in range(0, columns, lazy):
            part = slice(start, start + lazy)
            group = start // size
            codes[part], moved, wanted[part] = step(
                values[part], slope[part], hessian[part, part].contiguous(),
                scales[group], zeros[group], top,
            )  # fmt: skip
            values[part] += moved
            slope.addmm_(hessian[:, part], moved, alpha=-1)
    return codes, wanted


def descend_columns(
    values: torch.Tensor,
    slope: torch.Tensor,
    curvature: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    top: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns of one group in turn, each for the moves of those before it.

    ``values``: (columns, out), what they are now; ``slope``: the same rows of H (W - Ŵ);
    ``curvature``: their square of H; ``scale`` and ``zero``: (out,). Returns the codes, uint8, by
    how much the values moved, and what was rounded, all (columns, out).
    """
    left = slope.clone()
    codes, moved, wanted = (torch.empty_like(values) for _ in range(3))
    for j, value in enumerate(values):
        best = torch.add(value, left[j] / curvature[j, j], out=wanted[j])
        code = torch.div(best, scale, out=codes[j]).round_().add_(zero).clamp_(0, top)
        move = torch.sub((code - zero) * scale, value, out=moved[j])
        left[j + 1 :].addr_(curvature[j, j + 1 :], move, alpha=-1)
    return codes.byte(), moved, wanted
