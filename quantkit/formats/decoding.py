"""The values of weights that are stored as 8-bit or 4-bit floats, or 8-bit integers, with scales.

Products are computed in float32, where they are exact for scales of 16 bits, and rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes of a 4-bit float stand for (OCP Microscaling Formats, 5.3.3)."""
MX_BIAS = 127
"""Of exponents that are stored as a byte."""


def check_scales(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None
) -> None:
    """Raise ValueError where the scales are not those of a tensor, of rows, or of blocks."""
    rows, columns = weight
    if scale in ((), (1,), (1, 1), (rows,), (rows, 1)) and block is None:
        return
    if len(scale) != 2:
        raise ValueError("scales")
    if block is None and not (rows % scale[0] or columns % scale[1]):
        return
    if block and scale == (-(-rows // block[0]), -(-columns // block[1])):
        return
    raise ValueError("scales")


def scaled(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None = None,
    *,
    block: tuple[int, int] | None,
) -> torch.Tensor:
    """(out, in) float32: each element times its scale; the last block of a side may be cut off.

    ``scale``: one, (out,) or (out, 1), or one for each block of ``block`` rows and columns.
    ``zeros``: in the shape of ``scale``, subtracted from the elements first.
    """
    rows, columns = weight.shape
    values = weight.float()
    if zeros is not None:
        values = values - _spread(zeros.float(), rows, columns, block)
    return values * _spread(scale.float(), rows, columns, block)


def _spread(
    scale: torch.Tensor, rows: int, columns: int, block: tuple[int, int] | None
) -> torch.Tensor:
    """The scales, expanded to be multiplied with a matrix of these rows and columns."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.numel() == rows and scale.ndim == 1:
        return scale.view(rows, 1)
    high, wide = block or (rows // scale.shape[0], columns // scale.shape[1])
    tall = scale.repeat_interleave(high, 0)[:rows]
    return tall.repeat_interleave(wide, 1)[:, :columns]


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(experts, in, out) float32 of gpt-oss's stacks.

    ``blocks``: (experts, out, groups, 16) uint8, two elements each, the low half first.
    ``scales``: (experts, out, groups) uint8, exponents of 2.
    """
    import torch

    values = torch.ldexp(_halves(blocks), scales.int().unsqueeze(-1) - MX_BIAS)
    experts, rows = values.shape[:2]
    return values.reshape(experts, rows, -1).transpose(1, 2).contiguous()


def mxfp4_rows(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(out, in) float32; ``packed``: (out, in / 2) uint8, ``scale``: (out, groups) uint8, exponents
    of 2."""
    import torch

    values = _halves(packed)
    exponents = (scale.int() - MX_BIAS).repeat_interleave(values.shape[1] // scale.shape[1], 1)
    return torch.ldexp(values, exponents)


def nvfp4(packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """(out, in) float32; ``packed``: (out, in / 2) uint8, ``scale``: (out, groups) float8, which
    was multiplied by ``global_scale`` (1,) float32 to fit."""
    values = _halves(packed)
    scales = scale.float() / global_scale.float()
    return values * scales.repeat_interleave(values.shape[1] // scales.shape[1], 1)


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """The two elements of each byte, the low half first, on the last axis."""
    import torch

    table = torch.tensor(E2M1, device=packed.device)
    pairs = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return table[pairs.int()]
