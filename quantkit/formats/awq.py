"""The AWQ format: 4-bit GEMM checkpoints as AutoAWQ made them standard, asymmetric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantkit.formats.integer_linears import Integers, LinearLayout, Shapes
from quantkit.formats.packed import Packed, Quantization, unpack_linears
from quantkit.models.spec import GroupScheme
from quantkit.models.variant import Variant

if TYPE_CHECKING:
    import torch

BITS = (4,)
GROUP_SIZES = (32, 64, 128)


class AWQ(Packed):
    """GEMM files, as AutoAWQ made them standard."""

    name = "awq"

    def dequantize(self, variant: Variant) -> Iterator[tuple[str, torch.Tensor]]:
        """The plain state dict of an AWQ checkpoint, ours or others', weights as (out, in) float32.

        Raise IncompatibleVariant for bits or a version that cannot be unpacked.
        """
        quantization = Quantization.opened(variant.path)
        check(quantization)
        yield from unpack_linears(variant.path, ("qweight", "qzeros", "scales"), (), unpack)


def check(quantization: Quantization) -> None:
    """Raise IncompatibleVariant for bits or a version that cannot be unpacked."""
    quantization.require("bits", *BITS)
    quantization.require("version", "gemm", "GEMM")
    quantization.require("data_type", "int")


def layout(scheme: GroupScheme) -> LinearLayout:
    """The tensors of one linear in a GEMM file."""

    def shapes(inputs: int, outputs: int) -> Shapes:
        groups, words = inputs // scheme.group_size, outputs // (32 // scheme.bits)
        return {
            "qweight": ("I32", (inputs, words)),
            "qzeros": ("I32", (groups, words)),
            "scales": ("F16", (groups, outputs)),
        }

    return LinearLayout(scheme, shapes, pack, unpack)


def pack(integers: Integers) -> dict[str, torch.Tensor]:
    """The tensors of one linear: qweight, qzeros, scales."""
    from quantkit.formats.packing import AWQ_ORDER, pack_columns

    return {
        "qweight": pack_columns(integers.codes.T.contiguous(), BITS[0], AWQ_ORDER),
        "qzeros": pack_columns(integers.zeros.T.contiguous(), BITS[0], AWQ_ORDER),
        "scales": integers.scales.T.contiguous().half(),
    }


def unpack(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The (out, in) float32 weight."""
    from quantkit.formats.packing import AWQ_ORDER, unpack_columns

    codes = unpack_columns(qweight, BITS[0], AWQ_ORDER)
    size = codes.shape[0] // scales.shape[0]
    zeros = unpack_columns(qzeros, BITS[0], AWQ_ORDER).repeat_interleave(size, dim=0)
    return ((codes - zeros) * scales.float().repeat_interleave(size, dim=0)).T.contiguous()
