"""compressed-tensors made by quantkit: what vLLM serves on GPUs of each generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.engines.vllm.architectures import Fusion
from quantkit.errors import RecipeError
from quantkit.formats.compressed_tensors.layouts import group_scheme, layout
from quantkit.formats.compressed_tensors.presets import INT, MXFP4, NVFP4, Preset, preset
from quantkit.formats.integer_linears import LinearLayout
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.dtypes import stored_bytes, torch_dtype
from quantkit.models.spec import GroupScheme, Spec
from quantkit.producers.base import Converted, Plan
from quantkit.producers.integer_linears import (
    IntegerLinears,
    Names,
    entries,
    linear_names,
    needed,
    plan_linears,
)
from quantkit.producers.linear_options import LinearOptions

if TYPE_CHECKING:
    import torch

    from quantkit.data.calibration import Calibration
    from quantkit.formats.shards import Entry
    from quantkit.producers.block_conversion import BlockQuantizer
    from quantkit.producers.rounded_conversion import RoundTogether

GPTQ, AWQ, ROUNDING, BEST_SCALE = "gptq", "awq", "rtn", "best-scale"
GROUP_SIZES = (32, 64, 128, -1)


@dataclass(frozen=True)
class SchemeOptions:
    """What a scheme leaves open."""

    algorithm: str | None = None
    """Who decides on the weights: ``gptq`` (the default of integers), ``awq`` (W4A16_ASYM) or
    ``rtn``, round to nearest; of floats ``best-scale`` (the default but for MXFP4) or ``rtn``."""
    group_size: int | None = None
    """Input channels that share a scale, of W4A16, W4A16_ASYM and W8A16: 32, 64, 128 or -1 for
    all; 128 by default."""
    smoothing: bool | None = None
    """Whether outliers of activations are moved into the weights first (SmoothQuant), of W8A8 by
    ``gptq``; there it is the default."""


@dataclass(frozen=True)
class _Asked:
    """A spec, read: its scheme, who decides on the weights, the dtype of scales, the linears."""

    preset: Preset
    algorithm: str
    smoothing: bool
    dtype: str
    linears: IntegerLinears

    @property
    def calibrates(self) -> bool:
        """Whether the weights depend on text."""
        return self.algorithm in (GPTQ, AWQ)

    @property
    def resolved(self) -> dict[str, Any]:
        """Every option as it holds, for the manifest."""
        told: dict[str, Any] = {"algorithm": self.algorithm}
        if self.preset.layout == INT:
            told["smoothing"] = self.smoothing
        if self.preset.weights.group_size and self.preset.is_integer:
            told["group_size"] = self.preset.weights.group_size
        options = self.linears.options.resolved()
        if not self.calibrates:
            del options["rounding"]
        return told | options


class NativeCompressedTensors:
    """``compressed-tensors:W4A16`` and its like, under the library's own names."""

    formats = ("compressed-tensors",)
    resumes = True

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """As ``Producer.plan``; the bytes are those of all tensors, exactly."""
        asked = _asked(checkpoint, spec)
        planned = plan_linears(checkpoint, asked.linears)
        notes = [*planned.notes, *_notes(asked.preset)]
        return replace(
            planned,
            needs_calibration=asked.calibrates or asked.preset.scales_whole_inputs,
            notes=tuple(notes),
            options=asked.resolved,
        )

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """As ``Producer.convert``."""
        asked = _asked(checkpoint, spec)

        def describe(linears: IntegerLinears, names: Names) -> dict[str, Any]:
            schemes = linears.schemes(names.linears)
            skipped = [name for name in names.linears if name not in schemes]
            apart = [*skipped, *names.routers, *names.outside, *names.beside, "lm_head"]
            return asked.preset.described(list(dict.fromkeys(apart)))

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

            windows = needed(spec, calibration) if asked.preset.scales_whole_inputs else None
            converted = convert_rounded(
                checkpoint, asked.linears, directory, _rounding(asked), describe, windows
            )
        return replace(converted, options=asked.resolved)


def tensors_of(checkpoint: Checkpoint, spec: Spec) -> list[Entry]:
    """All tensors that a variant of ``spec`` has, whoever makes it."""
    from quantkit.decoder.blocks import DecoderBlocks

    blocks = DecoderBlocks(checkpoint)
    layouts = _asked(checkpoint, spec).linears.layouts(linear_names(blocks))
    return entries(blocks.checkpoint, blocks, layouts)


def _notes(preset: Preset) -> list[str]:
    inputs = preset.activations
    if inputs is None:
        return []
    kind = {("int", 8): "INT8", ("float", 8): "FP8", ("float", 4): "FP4"}
    of = "token" if inputs.strategy == "token" else f"group of {inputs.group_size} channels"
    if preset.scales_whole_inputs:
        of += ", below one of the whole input that calibration text decides on"
    return [
        f"engines round the inputs of linears too, to {kind[inputs.type, inputs.num_bits]} with a "
        f"scale for each {of}; what is measured here includes that"
    ]


def _quantizer(asked: _Asked, checkpoint: Checkpoint) -> BlockQuantizer:
    from quantkit.quantize.awq import BlockAWQ
    from quantkit.quantize.block_gptq import BlockGPTQ
    from quantkit.quantize.smooth import BlockSmoothed

    dtype, steps = checkpoint.dtype, asked.linears.options.steps
    if asked.algorithm == AWQ:
        return BlockAWQ(dtype, steps)
    if asked.smoothing:
        return BlockSmoothed(dtype, steps)
    return BlockGPTQ(dtype, steps, symmetric=asked.preset.weights.symmetric)


def _rounding(asked: _Asked) -> RoundTogether:
    """How weights are rounded that depend on no text."""
    from quantkit.quantize.float_weights import fp8, mxfp4, nvfp4
    from quantkit.quantize.rounding import minmax

    preset, scheme = asked.preset, asked.linears.scheme
    dtype, search = torch_dtype(asked.dtype), asked.algorithm == BEST_SCALE

    def one(weight: torch.Tensor) -> Any:
        if preset.layout == MXFP4:
            return mxfp4(weight, search=search)
        if not preset.is_integer:
            return fp8(weight, dtype, preset.weights.block, search=search)
        size, symmetric = scheme.columns(weight.shape[1]), preset.weights.symmetric
        return minmax(weight.float(), scheme.bits, size, dtype, symmetric=symmetric)

    def together(weights: Sequence[torch.Tensor]) -> list[Any]:
        if preset.layout == NVFP4:  # the scale of the whole tensor is theirs together
            return list(nvfp4(weights, search=search))
        return list(map(one, weights))

    return together


def _asked(checkpoint: Checkpoint, spec: Spec) -> _Asked:
    """Raise RecipeError for a scheme or an option that is unknown or does not fit."""
    own = [field.name for field in fields(SchemeOptions)]
    given: dict[str, Any] = {key: value for key, value in spec.options if key in own}
    chosen = SchemeOptions(**given)
    size = chosen.group_size
    if size is not None and size not in GROUP_SIZES:
        raise RecipeError(f"spec {spec}: group_size is {size!r}, expected one of {GROUP_SIZES}")
    found = preset(spec, size)
    known = [GPTQ, ROUNDING] if found.is_integer else [BEST_SCALE, ROUNDING]
    if not found.weights.symmetric:
        known.insert(1, AWQ)
    if found.layout == MXFP4:
        # The best power of 2 loses more as it is served (tests/benchmarks/RESULTS.md).
        known.reverse()
    algorithm = chosen.algorithm or known[0]
    if algorithm not in known:
        raise RecipeError(
            f"spec {spec}: algorithm is {algorithm!r}; {spec.scheme} takes {', '.join(known)}"
        )
    options = LinearOptions.of(spec, (4, 8), GROUP_SIZES, mixed=False, others=tuple(own))
    if options.steps and algorithm not in (GPTQ, AWQ):
        raise RecipeError(f"spec {spec}: rounding is learned after gptq or awq, not {algorithm}")
    dtype = min(checkpoint.scheme.upper(), "F32", key=lambda name: stored_bytes(name, (1,)))

    def laid_out(_: GroupScheme) -> LinearLayout:
        return layout(found, dtype)

    can_smooth = found.layout == INT and algorithm == GPTQ
    if chosen.smoothing and not can_smooth:
        raise RecipeError(f"spec {spec}: smoothing is for W8A8 by gptq")
    smoothing = can_smooth and chosen.smoothing is not False
    scaled = smoothing or algorithm == AWQ
    fusion = Fusion.of(checkpoint.architecture)
    linears = IntegerLinears(spec, group_scheme(found), options, laid_out, fusion, scaled=scaled)
    return _Asked(found, algorithm, smoothing, dtype, linears)
