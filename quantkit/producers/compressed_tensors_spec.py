"""What a spec of compressed-tensors asks for: schemes, who decides on the weights, options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from quantkit.engines.vllm.architectures import Fusion
from quantkit.errors import RecipeError
from quantkit.formats.compressed_tensors.layouts import PresetScheme, layout
from quantkit.formats.compressed_tensors.presets import INT, MXFP4, PACKED, PRESETS, Preset, preset
from quantkit.formats.integer_linears import LinearLayout
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.dtypes import stored_bytes
from quantkit.models.spec import GroupScheme, Spec
from quantkit.producers.integer_linears import IntegerLinears, Names
from quantkit.producers.linear_options import LinearOptions, fused_linears

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
class Asked:
    """A spec, read: the scheme of most linears, who decides on the weights of each scheme, the
    dtype of scales, the linears."""

    preset: Preset
    algorithms: Mapping[Preset, str]
    smoothing: bool
    dtype: str
    linears: IntegerLinears

    @property
    def calibrates(self) -> bool:
        """Whether the weights depend on text."""
        return any(one in (GPTQ, AWQ) for one in self.algorithms.values())

    @property
    def scales_whole_inputs(self) -> bool:
        """Whether text decides on scales of inputs."""
        return any(one.scales_whole_inputs for one in self.algorithms)

    @property
    def resolved(self) -> dict[str, Any]:
        """Every option as it holds, for the manifest."""
        by_scheme = {one.name: algorithm for one, algorithm in self.algorithms.items()}
        told: dict[str, Any] = {"algorithm": by_scheme}
        if len(by_scheme) == 1:
            told["algorithm"] = by_scheme[self.preset.name]
        if any(one.layout == INT for one in self.algorithms):
            told["smoothing"] = self.smoothing
        for one in self.algorithms:
            if one.weights.group_size and one.is_integer:
                told["group_size"] = one.weights.group_size
        options = self.linears.options.resolved()
        if not self.calibrates:
            del options["rounding"]
        return told | options

    def described(self, names: Names) -> dict[str, Any]:
        """The ``quantization_config``. A linear with another scheme is named as the checkpoint and
        as vLLM has it, which may run it as one with others."""
        schemes = self.linears.schemes(names.linears)
        skipped = [name for name in names.linears if name not in schemes]
        apart = [*skipped, *names.routers, *names.outside, *names.beside, "lm_head"]
        others: dict[Preset, dict[str, None]] = {}
        fusion = self.linears.fusion
        for fused, made_of in fused_linears(schemes, fusion.parts).items():
            preset = preset_of(schemes[made_of[0]])
            if preset != self.preset:
                called = [*made_of, fused]
                called += map(fusion.asked_as, [*made_of, fused])
                others.setdefault(preset, {}).update(dict.fromkeys(called))
        return self.preset.described(
            list(dict.fromkeys(apart)), {one: list(called) for one, called in others.items()}
        )


def preset_of(scheme: GroupScheme) -> Preset:
    """The scheme of compressed-tensors that this is of."""
    assert isinstance(scheme, PresetScheme)
    return scheme.preset


def asked_of(checkpoint: Checkpoint, spec: Spec) -> Asked:
    """Raise RecipeError for a scheme or an option that is unknown or does not fit."""
    own = [field.name for field in fields(SchemeOptions)]
    given: dict[str, Any] = {key: value for key, value in spec.options if key in own}
    chosen = SchemeOptions(**given)
    size = chosen.group_size
    if size is not None and size not in GROUP_SIZES:
        raise RecipeError(f"spec {spec}: group_size is {size!r}, expected one of {GROUP_SIZES}")

    def parse(one: Spec) -> PresetScheme:
        return PresetScheme.of(preset(one, size))

    found = preset(spec, size)
    options = LinearOptions.of(spec, parse, others=tuple(own))
    presets = dict.fromkeys([found, *(preset_of(scheme) for _, scheme in options.overrides)])
    if size is not None and all(one.layout != PACKED for one in presets):
        raise RecipeError(f"spec {spec}: group_size is for W4A16, W4A16_ASYM and W8A16")
    algorithms = _algorithms(spec, list(presets), chosen.algorithm)
    calibrates = any(one in (GPTQ, AWQ) for one in algorithms.values())
    if options.steps and not calibrates:
        used = ", ".join(dict.fromkeys(algorithms.values()))
        raise RecipeError(f"spec {spec}: rounding is learned after gptq or awq, not {used}")
    dtype = min(checkpoint.scheme.upper(), "F32", key=lambda name: stored_bytes(name, (1,)))

    def laid_out(scheme: GroupScheme) -> LinearLayout:
        return layout(preset_of(scheme), dtype)

    can_smooth = list(algorithms.items()) == [(PRESETS["W8A8"], GPTQ)]
    if chosen.smoothing and not can_smooth:
        raise RecipeError(f"spec {spec}: smoothing is for W8A8 by gptq, without overrides")
    smoothing = can_smooth and chosen.smoothing is not False
    scaled = smoothing or AWQ in algorithms.values()
    fusion = Fusion.of(checkpoint.architecture)
    scheme = PresetScheme.of(found)
    linears = IntegerLinears(spec, scheme, options, laid_out, fusion, scaled=scaled)
    return Asked(found, algorithms, smoothing, dtype, linears)


def _algorithms(spec: Spec, presets: Sequence[Preset], asked: str | None) -> dict[Preset, str]:
    """Who decides on the weights of each: the one that is asked for where the scheme takes it."""
    known = {one: _known_algorithms(one) for one in presets}
    offered = list(dict.fromkeys(name for names in known.values() for name in names))
    if asked not in (None, *offered):
        raise RecipeError(
            f"spec {spec}: algorithm is {asked!r}; {spec.scheme} takes {', '.join(offered)}"
        )
    found = {one: asked if asked in names else names[0] for one, names in known.items()}
    by_gptq = [one for one, algorithm in found.items() if algorithm == GPTQ]
    wrong = None
    if len(found) > 1 and AWQ in found.values():
        wrong = "awq scales linears of one scheme, without overrides"
    elif len({one.weights.symmetric for one in by_gptq}) > 1:
        wrong = "gptq takes no mix of W4A16_ASYM and symmetric integers; use algorithm: rtn"
    elif by_gptq and any(one.scales_whole_inputs for one in found):
        wrong = "gptq takes no mix of integers and NVFP4; use algorithm: rtn"
    if wrong:
        raise RecipeError(f"spec {spec}: {wrong}")
    return found


def _known_algorithms(one: Preset) -> list[str]:
    """The default first."""
    if one.is_integer:
        return [GPTQ, ROUNDING] if one.weights.symmetric else [GPTQ, AWQ, ROUNDING]
    # The best power of 2 loses more as it is served (tests/benchmarks/RESULTS.md).
    return [ROUNDING, BEST_SCALE] if one.layout == MXFP4 else [BEST_SCALE, ROUNDING]
