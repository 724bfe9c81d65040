"""Weights as floats of 8 or 4 bits: with the largest magnitude's scale, or the best one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad

from quantkit.formats.decoding import MX_BIAS
from quantkit.formats.floats import (
    E2M1_MAX,
    E4M3_MAX,
    mx_exponents,
    pack_e2m1,
    round_e2m1,
    to_e4m3,
)

_FACTORS = torch.linspace(0.70, 1.60, 19).tolist()
"""Of the scale at which a group's largest magnitude is the largest float; 1.5 makes it 4 of 6, and
the floats above 4 are the coarsest."""


def fp8(
    weight: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] | None, *, search: bool
) -> dict[str, torch.Tensor]:
    """``weight`` (out, in) as E4M3, and its scales in ``dtype``: of channels, (out, 1), or of
    blocks, the last of a side cut off. ``search``: for the scale with the least squared error."""
    rows, columns = weight.shape
    high, wide = block or (1, columns)
    padded = pad(weight.float(), (0, -columns % wide, 0, -rows % high))
    tall, broad = padded.shape[0] // high, padded.shape[1] // wide
    grouped = padded.view(tall, high, broad, wide).transpose(1, 2).reshape(tall * broad, -1)

    def stored(scale: torch.Tensor) -> torch.Tensor:
        return scale.to(dtype).float()

    scale = _scales(grouped, E4M3_MAX, stored, lambda v: to_e4m3(v).float(), search=search)
    found = to_e4m3(grouped / scale).view(tall, broad, high, wide).transpose(1, 2)
    return {
        "weight": found.reshape(padded.shape)[:rows, :columns].contiguous(),
        "weight_scale": scale.view(tall, broad).to(dtype),
    }


def global_scale(largest: float) -> torch.Tensor:
    """What the scales of groups are multiplied by to fill the range of E4M3, (1,) float32, where
    ``largest`` is the largest magnitude of all; 1 where it is next to nothing."""
    # By the inverse, as torch and so the library divides by a tensor.
    factor = E4M3_MAX * E2M1_MAX * torch.tensor([largest]).reciprocal()
    return torch.where(factor.isfinite(), factor, 1.0)


def nvfp4(weights: Sequence[torch.Tensor], *, search: bool) -> list[dict[str, torch.Tensor]]:
    """Weights (out, in) that engines run as one linear, as E2M1 with an E4M3 scale for 16 inputs
    and one scale for all of them, as engines hold only one."""
    largest = max(float(weight.abs().amax()) for weight in weights)
    whole = global_scale(largest).to(weights[0].device)
    found = []
    for weight in weights:
        grouped = weight.float().view(-1, 16)

        def stored(scale: torch.Tensor) -> torch.Tensor:
            return to_e4m3(scale * whole).float() / whole

        scale = _scales(grouped, E2M1_MAX, stored, round_e2m1, search=search)
        packed = pack_e2m1(round_e2m1(grouped / scale).view(weight.shape))
        scales = to_e4m3(scale * whole).view(len(weight), -1)
        parts = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": whole}
        found.append(parts)
    return found


def mxfp4(weight: torch.Tensor, *, search: bool) -> dict[str, torch.Tensor]:
    """``weight`` (out, in) as E2M1 with an exponent of 2 for 32 inputs (OCP Microscaling)."""
    grouped = weight.float().view(-1, 32)
    exponents = mx_exponents(grouped.abs().amax(-1, keepdim=True))
    if search:
        tried = torch.stack([exponents - 1, exponents, exponents + 1]).clamp(-127, 127)
        scales = torch.exp2(tried.float())
        errors = (round_e2m1(grouped / scales) * scales - grouped).square().sum(-1, keepdim=True)
        exponents = tried.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)
    rounded = round_e2m1(grouped / torch.exp2(exponents.float())).view(weight.shape)
    stored = (exponents + MX_BIAS).to(torch.uint8).view(len(weight), -1)
    return {"weight_packed": pack_e2m1(rounded), "weight_scale": stored}


def _scales(
    grouped: torch.Tensor,
    top: float,
    stored: Callable[[torch.Tensor], torch.Tensor],
    near: Callable[[torch.Tensor], torch.Tensor],
    *,
    search: bool,
) -> torch.Tensor:
    """The scale of each row of ``grouped`` (n, size), (n, 1): as it will be ``stored``, and never
    0, which nothing can be divided by."""
    smallest = torch.finfo(torch.float32).tiny

    def kept(scale: torch.Tensor) -> torch.Tensor:
        found = stored(scale)
        return torch.where(found > smallest, found, torch.ones_like(found))

    plain = grouped.abs().amax(-1, keepdim=True) / top
    best = kept(plain)
    if not search:
        return best
    least = torch.full_like(best, torch.inf)
    for factor in (1.0, *_FACTORS):
        scale = kept(plain * factor)
        error = near(grouped / scale).mul_(scale).sub_(grouped).square_().sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best
