"""AWQ made by quantkit: block after block, each on the output of the quantized ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.formats.awq import BITS, GROUP_SIZES, layout
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import GroupScheme, Spec
from quantkit.producers.base import Converted, Plan
from quantkit.producers.integer_linears import IntegerLinears, plan_linears
from quantkit.producers.linear_options import LinearOptions

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration


class NativeAWQ:
    """``awq:w4g128`` and its like: 4 bits, groups of 32, 64 or 128."""

    formats = ("awq",)
    resumes = True

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """As ``Producer.plan``; the bytes are those of all tensors, exactly."""
        return plan_linears(checkpoint, _asked(spec))

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """As ``Producer.convert``; block after block, each on the output of the quantized ones."""
        from quantkit.producers.block_conversion import convert_checkpoint
        from quantkit.quantize.awq import BlockAWQ
        from quantkit.quantize.gptq import DAMP_PERCENT

        asked = _asked(spec)
        quantize = BlockAWQ(checkpoint.dtype, asked.options.steps)
        converted, config = convert_checkpoint(
            checkpoint, asked, calibration, directory, quantize, quantization_config
        )
        return replace(converted, options={**config, "damp_percent": DAMP_PERCENT})


def _asked(spec: Spec) -> IntegerLinears:
    scheme = GroupScheme.parse(spec, BITS, GROUP_SIZES)
    options = LinearOptions.of(spec, BITS, GROUP_SIZES, mixed=False)
    return IntegerLinears(spec, scheme, options, layout, scaled=True)


def quantization_config(
    asked: IntegerLinears,
    linears: Sequence[str],
    routers: Sequence[str],
    beside: Sequence[str],
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
        "modules_to_not_convert": [*skipped, *routers, *beside] or None,
    }
