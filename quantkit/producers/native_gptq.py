"""GPTQ made by quantkit: block after block, each on the output of the quantized ones."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.decoder.expert_names import is_routed
from quantkit.engines.vllm.architectures import Fusion
from quantkit.formats.gptq import BITS, GROUP_SIZES, layout
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import GroupScheme, Spec
from quantkit.producers.base import Converted, Plan
from quantkit.producers.integer_linears import IntegerLinears, Names, plan_linears
from quantkit.producers.linear_options import LinearOptions, dynamic

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration


_NUMBERED = re.compile(r"^.*\.\d+\.")
"""What precedes a linear's name in its block."""


class NativeGPTQ:
    """``gptq:w4g128`` and its like: bits 4 or 8, groups of 32, 64, 128 or a whole row (-1)."""

    formats = ("gptq",)
    resumes = True

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """As ``Producer.plan``; the bytes are those of all tensors, exactly."""
        return plan_linears(checkpoint, _asked(checkpoint, spec))

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """As ``Producer.convert``; block after block, each on the output of the quantized ones."""
        from quantkit.producers.block_conversion import convert_checkpoint
        from quantkit.quantize.block_gptq import BlockGPTQ

        asked = _asked(checkpoint, spec)
        quantize = BlockGPTQ(checkpoint.dtype, asked.options.steps)
        converted, config = convert_checkpoint(
            checkpoint, asked, calibration, directory, quantize, quantization_config
        )
        (directory / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n")
        return replace(converted, options={**config, "act_order": "groups"})


def _asked(checkpoint: Checkpoint, spec: Spec) -> IntegerLinears:
    parse = partial(GroupScheme.parse, bits=BITS, group_sizes=GROUP_SIZES)
    options = LinearOptions.of(spec, parse)
    fusion = Fusion.of(checkpoint.architecture)
    return IntegerLinears(spec, parse(spec), options, layout, fusion)


def quantization_config(asked: IntegerLinears, names: Names) -> dict[str, Any]:
    """What transformers, vLLM and GPTQModel read to load the checkpoint."""
    from quantkit.quantize.gptq import DAMP_PERCENT

    scheme = asked.scheme
    everything = [*names.linears, *names.routers]
    departing = dynamic(scheme, asked.schemes(names.linears), everything, asked.fusion)
    # Engines call these by other names than the checkpoint, but for the last part.
    departing |= {rf"-:(?:.*\.)?{re.escape(name)}(?:\..*)?$": {} for name in names.beside}
    inside = {_NUMBERED.sub("", name) for name in names.linears if not is_routed(name)}
    misnamed = asked.fusion.misnamed(inside)
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
        # By default vLLM finds what is quantized by the names in the file, these it would miss.
        **({"modules_in_block_to_quantize": [sorted(inside) + misnamed]} if misnamed else {}),
    }
