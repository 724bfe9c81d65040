"""The GPTQ format: version 1 checkpoints as AutoGPTQ made them standard, symmetric."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from quantkit.formats.integer_linears import Integers, LinearLayout, Shapes
from quantkit.formats.packed import Packed, Quantization, packing, unpack_linears
from quantkit.models.spec import GroupScheme
from quantkit.models.variant import Variant

if TYPE_CHECKING:
    import torch

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, -1)


class GPTQ(Packed):
    """Version 1 files, as AutoGPTQ made them standard, and others that say how they differ."""

    name = "gptq"

    def dequantize(self, variant: Variant) -> Iterator[tuple[str, torch.Tensor]]:
        """The plain state dict of a GPTQ checkpoint, ours or others', weights as (out, in) float32.

        Raise IncompatibleVariant for a checkpoint format that cannot be unpacked.
        """
        weight = partial(unpack, zero_offset=zero_offset(Quantization.opened(variant.path)))
        yield from unpack_linears(variant.path, ("qweight", "qzeros", "scales"), ("g_idx",), weight)


def layout(scheme: GroupScheme) -> LinearLayout:
    """The tensors of one linear in a version 1 file."""

    def shapes(inputs: int, outputs: int) -> Shapes:
        groups = 1 if scheme.group_size == -1 else inputs // scheme.group_size
        per_word = 32 // scheme.bits
        return {
            "qweight": ("I32", (inputs // per_word, outputs)),
            "qzeros": ("I32", (groups, outputs // per_word)),
            "scales": ("F16", (groups, outputs)),
            "g_idx": ("I32", (inputs,)),
        }

    return LinearLayout(
        scheme, shapes, partial(pack, bits=scheme.bits), partial(unpack, zero_offset=1)
    )


def pack(integers: Integers, bits: int) -> dict[str, torch.Tensor]:
    """The tensors of one linear: qweight, qzeros, scales, g_idx."""
    import torch

    from quantkit.formats.packing import pack_columns, pack_rows

    codes = integers.codes
    groups = torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device)
    return {
        "qweight": pack_rows(codes.T.contiguous(), bits),
        # Version 1 stores each zero less one.
        "qzeros": pack_columns(integers.zeros.T.contiguous() - 1, bits),
        "scales": integers.scales.T.contiguous().half(),
        "g_idx": groups // integers.group_size,
    }


def unpack(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    *,
    zero_offset: int,
) -> torch.Tensor:
    """The (out, in) float32 weight; ``zero_offset``: what a stored zero lacks, 1 in version 1.

    How many bits there are follows from the shapes, so that layers may have their own. ``g_idx``:
    the group of each input, in any order (``desc_act``); None where groups are contiguous.
    """
    import torch

    from quantkit.formats.packing import unpack_columns, unpack_rows

    groups, outputs = scales.shape
    bits = qzeros.shape[1] * 32 // outputs
    codes = unpack_rows(qweight, bits)
    inputs = codes.shape[0]
    zeros = (unpack_columns(qzeros, bits) + zero_offset) & ((1 << bits) - 1)
    group = (
        torch.arange(inputs, device=codes.device) // -(-inputs // groups)
        if g_idx is None
        else g_idx.long()
    )
    return ((codes - zeros[group]) * scales.float()[group]).T.contiguous()


def zero_offset(quantization: Quantization) -> int:
    """1 where each zero is stored less one, 0 where as it is."""
    config = quantization.config
    if config["quant_method"] == "gptq":
        quantization.require("checkpoint_format", "gptq", "gptq_v2")
        quantization.require("is_marlin_format", False)
        return 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    quantization.require("data_type", "int")
    # AutoRound: `auto_round:auto_gptq`, or of its own, with zeros as they are.
    return 1 if "gptq" in packing(config).replace("gptqmodel", "") else 0
