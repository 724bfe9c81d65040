"""AWQ made by quantkit: block after block, each on the output of the quantized ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.decoder.expert_names import is_routed, mixture_of
from quantkit.engines.vllm.architectures import Fusion
from quantkit.formats.awq import BITS, GROUP_SIZES, layout
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import GroupScheme, Spec
from quantkit.producers.base import Converted, Plan
from quantkit.producers.integer_linears import IntegerLinears, Names, plan_linears
from quantkit.producers.linear_options import LinearOptions, fused_linears

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration


class NativeAWQ:
    """``awq:w4g128`` and its like: 4 bits, groups of 32, 64 or 128."""

    formats = ("awq",)
    resumes = True

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """As ``Producer.plan``; the bytes are those of all tensors, exactly."""
        return plan_linears(checkpoint, _asked(checkpoint, spec))

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """As ``Producer.convert``; block after block, each on the output of the quantized ones."""
        from quantkit.producers.block_conversion import convert_checkpoint
        from quantkit.quantize.awq import BlockAWQ
        from quantkit.quantize.gptq import DAMP_PERCENT

        asked = _asked(checkpoint, spec)
        quantize = BlockAWQ(checkpoint.dtype, asked.options.steps)
        converted, config = convert_checkpoint(
            checkpoint, asked, calibration, directory, quantize, quantization_config
        )
        return replace(converted, options={**config, "damp_percent": DAMP_PERCENT})


def _asked(checkpoint: Checkpoint, spec: Spec) -> IntegerLinears:
    scheme = GroupScheme.parse(spec, BITS, GROUP_SIZES)
    options = LinearOptions.of(spec)
    fusion = Fusion.of(checkpoint.architecture)
    return IntegerLinears(spec, scheme, options, layout, fusion, scaled=True)


def quantization_config(asked: IntegerLinears, names: Names) -> dict[str, Any]:
    """What transformers, vLLM and AutoAWQ read to load the checkpoint."""
    schemes = asked.schemes(names.linears)
    skipped = [name for name in names.linears if name not in schemes]
    # Where nothing is named, vLLM leaves out what holds anything unquantized: whole blocks.
    whole = fused_linears((name for name in skipped if not is_routed(name)), asked.fusion.parts)
    unquantized = [*skipped, *whole, *names.routers, *names.outside]
    apart = _shortened(unquantized, schemes, asked.fusion)
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": asked.scheme.bits,
        "group_size": asked.scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": [*apart, *names.beside],
    }


def _shortened(names: Sequence[str], quantized: Iterable[str], fusion: Fusion) -> list[str]:
    """The last part alone of names, where nothing that is quantized has it in its own: engines
    call what precedes it otherwise, and look for these in their names."""
    usual = {name for whole, parts in fusion.parts.items() for name in (whole, *parts)}
    taken = {*quantized, *fused_linears(quantized, fusion.parts), *usual}
    found: dict[str, bool] = {}
    for name in names:
        last = name.rpartition(".")[2]
        whole = mixture_of(name) if is_routed(name) else name
        if is_routed(name) or any(last in other for other in taken):
            found |= {whole: True, fusion.asked_as(whole): True}
        else:
            found[last] = True
    return list(found)
