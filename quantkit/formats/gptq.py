"""The GPTQ format: version 1 checkpoints as AutoGPTQ made them standard, symmetric."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
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
from quantkit.formats.linear_options import LinearOptions, dynamic
from quantkit.formats.packed import Quantization, packed_facts, packing, unpack_linears
from quantkit.spec import GroupScheme, Spec
from quantkit.variant import Variant

if TYPE_CHECKING:
    import torch

    from quantkit.calibration import Calibration
    from quantkit.quantize.rounding import Integers

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, -1)


class GPTQ:
    """``gptq:w4g128`` and its like: bits 4 or 8, groups of 32, 64, 128 or a whole row (-1)."""

    name = "gptq"
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
        from quantkit.quantize.block_gptq import BlockGPTQ

        asked, windows = _asked(spec), needed(spec, calibration)
        blocks = DecoderBlocks(checkpoint, windows.device, windows.precision)
        quantize = BlockGPTQ(checkpoint.dtype, asked.options.steps)
        converted = convert_linears(blocks, asked, windows, directory, quantize)
        config = quantization_config(asked, linear_names(blocks), router_names(blocks))
        write_config(checkpoint, directory, config)
        (directory / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n")
        return replace(converted, options={**config, "act_order": "groups"})

    def inspect(self, variant: Variant) -> dict[str, Any]:
        """As ``Format.inspect``."""
        return packed_facts(variant.path)


def _asked(spec: Spec) -> IntegerLinears:
    scheme = GroupScheme.parse(spec, BITS, GROUP_SIZES)
    options = LinearOptions.of(spec, BITS, GROUP_SIZES, mixed=True)
    return IntegerLinears(spec, scheme, options, layout)


def quantization_config(
    asked: IntegerLinears, linears: Sequence[str], routers: Sequence[str]
) -> dict[str, Any]:
    """What transformers, vLLM and GPTQModel read to load the checkpoint."""
    from quantkit.quantize.gptq import DAMP_PERCENT

    scheme = asked.scheme
    departing = dynamic(scheme, asked.schemes(linears), [*linears, *routers])
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": True,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": False,
        "lm_head": False,
        "damp_percent": DAMP_PERCENT,
        **({"dynamic": departing} if departing else {}),
    }


def layout(scheme: GroupScheme) -> LinearLayout:
    """The tensors of one linear in a version 1 file."""

    def shapes(inputs: int, outputs: int) -> dict[str, tuple[str, tuple[int, ...]]]:
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
    """The tensors of one linear: qweight, qzeros, scales, g_idx (DESIGN, section 4)."""
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


def dequantize(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain state dict of a GPTQ checkpoint, ours or others', weights as (out, in) float32.

    Raise IncompatibleVariant for a checkpoint format that cannot be unpacked.
    """
    weight = partial(unpack, zero_offset=_zero_offset(Quantization.opened(directory)))
    yield from unpack_linears(directory, ("qweight", "qzeros", "scales"), ("g_idx",), weight)


def _zero_offset(quantization: Quantization) -> int:
    """1 where each zero is stored less one, 0 where as it is."""
    config = quantization.config
    if config["quant_method"] == "gptq":
        quantization.require("checkpoint_format", "gptq", "gptq_v2")
        quantization.require("is_marlin_format", False)
        return 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    quantization.require("data_type", "int")
    # AutoRound: `auto_round:auto_gptq`, or of its own, with zeros as they are.
    return 1 if "gptq" in packing(config).replace("gptqmodel", "") else 0
