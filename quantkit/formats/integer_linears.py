"""A linear as integers with a scale per group, and how it lies in a file as several tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.models.spec import GroupScheme

if TYPE_CHECKING:
    import torch


Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of each tensor that a linear is stored as, by the end of its name."""


@dataclass(frozen=True)
class Integers:
    """The weights of one linear as unsigned integers: ``w ≈ (codes - zeros) * scales``.

    ``codes``: (out, in) uint8 in [0, 2**bits); ``scales``: (out, groups) float32, each exactly
    representable in float16; ``zeros``: (out, groups) int32. Group g holds the input channels
    [g * group_size, (g + 1) * group_size).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def group_size(self) -> int:
        """Input channels that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def rows(self, start: int, stop: int) -> Integers:
        """Some of the output channels."""
        return Integers(self.codes[start:stop], self.scales[start:stop], self.zeros[start:stop])

    def dequantize(self) -> torch.Tensor:
        """The weights that engines compute with: (out, in) float32."""
        size = self.group_size
        zeros = self.zeros.repeat_interleave(size, dim=1)
        return (self.codes - zeros) * self.scales.repeat_interleave(size, dim=1)


@dataclass(frozen=True)
class Floats:
    """The weights of one linear as floats of fewer bits: the ``tensors`` that a file has, by the
    ends of their names, and the ``weight`` (out, in) float32 that they stand for."""

    tensors: Mapping[str, torch.Tensor]
    weight: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """As ``Integers.dequantize``."""
        return self.weight


@dataclass(frozen=True)
class LinearLayout:
    """How one linear of a scheme lies in a file, as several tensors.

    ``shapes(in, out)``: dtype and shape of each, by the end of its name (``qweight``).
    ``pack(integers)`` gives them, ``unpack(*tensors)`` the (out, in) float32 weight again.
    ``block``: the rows and columns that share a scale, where it is not a group of a row.
    """

    scheme: GroupScheme
    shapes: Callable[[int, int], Shapes]
    pack: Callable[[Any], dict[str, torch.Tensor]]
    unpack: Callable[..., torch.Tensor]
    block: tuple[int, int] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The ends of their names."""
        return tuple(self.shapes(128, 128))
