"""compressed-tensors made by quantkit: what vLLM serves on GPUs of each generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.decoder.expert_names import is_routed
from quantkit.errors import RecipeError
from quantkit.formats.compressed_tensors.presets import MXFP4, NVFP4, Preset
from quantkit.formats.integer_linears import Floats, Integers
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.dtypes import torch_dtype
from quantkit.models.spec import GroupScheme, Spec
from quantkit.producers.base import Converted, Plan
from quantkit.producers.compressed_tensors_spec import AWQ, BEST_SCALE, Asked, asked_of, preset_of
from quantkit.producers.integer_linears import (
    IntegerLinears,
    Names,
    entries,
    linear_names,
    needed,
    plan_linears,
)

if TYPE_CHECKING:
    import torch

    from quantkit.data.calibration import Calibration
    from quantkit.formats.shards import Entry
    from quantkit.producers.block_conversion import BlockQuantizer
    from quantkit.producers.rounded_conversion import RoundTogether


class NativeCompressedTensors:
    """``compressed-tensors:W4A16`` and its like, under the library's own names."""

    formats = ("compressed-tensors",)
    resumes = True

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """As ``Producer.plan``; the bytes are those of all tensors, exactly."""
        asked = asked_of(checkpoint, spec)
        planned = plan_linears(checkpoint, asked.linears)
        if len(asked.algorithms) > 1:
            _refuse_mixed_experts(checkpoint, asked)
        notes = [*planned.notes, *(note for one in asked.algorithms for note in _notes(one))]
        return replace(
            planned,
            needs_calibration=asked.calibrates or asked.scales_whole_inputs,
            notes=tuple(notes),
            options=asked.resolved,
        )

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """As ``Producer.convert``."""
        asked = asked_of(checkpoint, spec)

        def describe(_: IntegerLinears, names: Names) -> dict[str, Any]:
            return asked.described(names)

        if asked.calibrates:
            from quantkit.producers.block_conversion import convert_checkpoint

            converted, _ = convert_checkpoint(
                checkpoint,
                asked.linears,
                calibration,
                directory,
                _quantizer(asked, checkpoint),
                describe,
            )
        else:
            from quantkit.producers.rounded_conversion import convert_rounded

            windows = needed(spec, calibration) if asked.scales_whole_inputs else None
            converted = convert_rounded(
                checkpoint, asked.linears, directory, _rounding(asked), describe, windows
            )
        return replace(converted, options=asked.resolved)


def tensors_of(checkpoint: Checkpoint, spec: Spec) -> list[Entry]:
    """All tensors that a variant of ``spec`` has, whoever makes it."""
    from quantkit.decoder.blocks import DecoderBlocks

    blocks = DecoderBlocks(checkpoint)
    layouts = asked_of(checkpoint, spec).linears.layouts(linear_names(blocks))
    return entries(blocks.checkpoint, blocks, layouts)


def _notes(preset: Preset) -> list[str]:
    inputs = preset.activations
    if inputs is None:
        return []
    kind = {("int", 8): "INT8", ("float", 8): "FP8", ("float", 4): "FP4"}
    of = "token" if inputs.strategy == "token" else f"group of {inputs.group_size} channels"
    if preset.scales_whole_inputs:
        of += ", below one of the whole input that calibration text decides on"
    told = (
        f"engines round the inputs of linears too, to {kind[inputs.type, inputs.num_bits]} with a "
        f"scale for each {of}; what is measured here includes that"
    )
    if inputs.num_bits == 4:
        told += ", which vLLM leaves out on GPUs without FP4 units (before Blackwell)"
    return [told]


def _refuse_mixed_experts(checkpoint: Checkpoint, asked: Asked) -> None:
    """vLLM asks for the scheme of experts under names that not all checkpoints have."""
    from quantkit.decoder.blocks import DecoderBlocks

    names = linear_names(DecoderBlocks(checkpoint))
    for name, scheme in asked.linears.schemes(names).items():
        if is_routed(name) and preset_of(scheme) != asked.preset:
            raise RecipeError(
                f"spec {asked.linears.spec}: experts have the scheme of the spec, not an "
                f"override's ({name}: {scheme}); override the other linears instead"
            )


def _quantizer(asked: Asked, checkpoint: Checkpoint) -> BlockQuantizer:
    from quantkit.quantize.awq import BlockAWQ
    from quantkit.quantize.block_gptq import BlockGPTQ
    from quantkit.quantize.mixed import BlockMixed
    from quantkit.quantize.smooth import BlockSmoothed

    dtype, steps = checkpoint.dtype, asked.linears.options.steps
    if AWQ in asked.algorithms.values():
        return BlockAWQ(dtype, steps)
    if asked.smoothing:
        return BlockSmoothed(dtype, steps)
    integers = [one for one in asked.algorithms if one.is_integer]
    by_gptq = BlockGPTQ(dtype, steps, symmetric=integers[0].weights.symmetric)
    if len(integers) == len(asked.algorithms):
        return by_gptq
    together = _rounding(asked)

    def floats(weight: torch.Tensor, scheme: GroupScheme) -> Floats | None:
        return None if preset_of(scheme).is_integer else together([weight], scheme)[0]

    return BlockMixed(by_gptq, floats)


def _rounding(asked: Asked) -> RoundTogether:
    """How weights are rounded that depend on no text."""
    from quantkit.quantize.float_weights import fp8, mxfp4, nvfp4
    from quantkit.quantize.rounding import minmax

    dtype = torch_dtype(asked.dtype)

    def floats(weights: Sequence[torch.Tensor], preset: Preset) -> list[dict[str, torch.Tensor]]:
        search = asked.algorithms[preset] == BEST_SCALE
        if preset.layout == NVFP4:  # the scale of the whole tensor is theirs together
            return nvfp4(weights, search=search)
        if preset.layout == MXFP4:
            return [mxfp4(weight, search=search) for weight in weights]
        return [fp8(weight, dtype, preset.weights.block, search=search) for weight in weights]

    def together(weights: Sequence[torch.Tensor], scheme: GroupScheme) -> list[Integers | Floats]:
        preset = preset_of(scheme)
        if not preset.is_integer:
            unpack = asked.linears.layout(scheme).unpack
            rounded = floats(weights, preset)
            return [Floats(tensors, unpack(*tensors.values())) for tensors in rounded]
        symmetric = preset.weights.symmetric
        return [
            minmax(w.float(), scheme.bits, scheme.columns(w.shape[1]), dtype, symmetric=symmetric)
            for w in weights
        ]

    return together
