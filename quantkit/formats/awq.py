"""The AWQ format: 4-bit GEMM checkpoints as AutoAWQ made them standard, asymmetric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.formats.base import Converted, Plan
from quantkit.formats.integer_linears import (
    IntegerLinears,
    LinearLayout,
    linear_names,
    needed,
    plan_linears,
    router_names,
    write_config,
)
from quantkit.formats.linear_options import LinearOptions
from quantkit.formats.packed import Quantization, packed_facts, unpack_linears
from quantkit.spec import GroupScheme, Spec
from quantkit.variant import Variant

if TYPE_CHECKING:
    import torch

    from quantkit.calibration import Calibration
    from quantkit.quantize.rounding import Integers

BITS = (4,)
GROUP_SIZES = (32, 64, 128)


class AWQ:
    """``awq:w4g128`` and its like: 4 bits, groups of 32, 64 or 128."""

    name = "awq"
    resumes = True

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """As ``Format.plan``; the bytes are those of all tensors, exactly."""
        return plan_linears(checkpoint, _asked(spec))

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """As ``Format.convert``; block after block, each on the output of the quantized ones."""
        from quantkit.decoder.blocks import DecoderBlocks
        from quantkit.formats.block_conversion import convert_linears
        from quantkit.quantize.awq import BlockAWQ
        from quantkit.quantize.gptq import DAMP_PERCENT

        asked, windows = _asked(spec), needed(spec, calibration)
        blocks = DecoderBlocks(checkpoint, windows.device, windows.precision)
        quantize = BlockAWQ(checkpoint.dtype, asked.options.steps)
        converted = convert_linears(blocks, asked, windows, directory, quantize)
        config = quantization_config(asked, linear_names(blocks), router_names(blocks))
        write_config(checkpoint, directory, config)
        return replace(converted, options={**config, "damp_percent": DAMP_PERCENT})

    def inspect(self, variant: Variant) -> dict[str, Any]:
        """As ``Format.inspect``."""
        return packed_facts(variant.path)


def _asked(spec: Spec) -> IntegerLinears:
    scheme = GroupScheme.parse(spec, BITS, GROUP_SIZES)
    options = LinearOptions.of(spec, BITS, GROUP_SIZES, mixed=False)
    return IntegerLinears(spec, scheme, options, layout, scaled=True)


def quantization_config(
    asked: IntegerLinears, linears: Sequence[str], routers: Sequence[str]
) -> dict[str, Any]:
    """What transformers, vLLM and AutoAWQ read to load the checkpoint."""
    schemes = asked.schemes(linears)
    skipped = [name for name in linears if name not in schemes]
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": asked.scheme.bits,
        "group_size": asked.scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": [*skipped, *routers] or None,
    }


def layout(scheme: GroupScheme) -> LinearLayout:
    """The tensors of one linear in a GEMM file."""

    def shapes(inputs: int, outputs: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        groups, words = inputs // scheme.group_size, outputs // (32 // scheme.bits)
        return {
            "qweight": ("I32", (inputs, words)),
            "qzeros": ("I32", (groups, words)),
            "scales": ("F16", (groups, outputs)),
        }

    return LinearLayout(scheme, shapes, pack, unpack)


def pack(integers: Integers) -> dict[str, torch.Tensor]:
    """The tensors of one linear: qweight, qzeros, scales (DESIGN, section 4)."""
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


def dequantize(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain state dict of an AWQ checkpoint, ours or others', weights as (out, in) float32.

    Raise IncompatibleVariant for bits or a version that cannot be unpacked.
    """
    quantization = Quantization.opened(directory)
    quantization.require("bits", *BITS)
    quantization.require("version", "gemm", "GEMM")
    quantization.require("data_type", "int")
    yield from unpack_linears(directory, ("qweight", "qzeros", "scales"), (), unpack)
