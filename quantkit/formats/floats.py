"""Rounding to the floats of 8 and 4 bits that kernels multiply: E4M3 and E2M1."""

from __future__ import annotations

import torch

from quantkit.formats.decoding import E2M1

E4M3_MAX = 448.0
E2M1_MAX = 6.0


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """The nearest float of 8 bits, ties to even; what is beyond its range becomes its largest."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_e2m1(values: torch.Tensor) -> torch.Tensor:
    """The nearest of ±0, ½, 1, 1½, 2, 3, 4 and 6, ties to even, in the dtype that was given."""
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(values.dtype)
    return ((values / step).round() * step).clamp(-E2M1_MAX, E2M1_MAX)


def pack_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Values of ``round_e2m1`` (rows, columns) as (rows, columns / 2) uint8: two in a byte, the
    first in its low half."""
    table = torch.tensor(E2M1[:8], device=values.device)
    codes = torch.searchsorted(table, values.abs().float().contiguous()).byte()
    codes |= values.signbit().byte() << 3
    return codes[:, ::2] | codes[:, 1::2] << 4


def mx_exponents(largest: torch.Tensor) -> torch.Tensor:
    """The exponents of 2, int32, of groups whose largest magnitudes these are, for E2M1 values.

    As the MX specification has it (floor(log2 largest) - 2), but that a largest value that would
    round up to the next power of 2 counts as that.
    """
    mantissa, exponent = torch.frexp(largest.float())  # largest = mantissa * 2**exponent, ½ ≤ m < 1
    exponent = exponent - 1 + (mantissa >= 0.875).int()
    return torch.where(largest == 0, -127, exponent - 2).clamp(-127, 127)
