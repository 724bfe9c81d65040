"""llm-compressor, vLLM's own quantizer, as a producer of compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from quantkit import registry
from quantkit.errors import ConversionError, RecipeError
from quantkit.formats.compressed_tensors.layouts import PresetScheme
from quantkit.formats.compressed_tensors.presets import INT, PACKED, Preset, Rounding, preset
from quantkit.formats.packed import Quantization
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.tensors import TensorInfo, tensors_in
from quantkit.producers.base import Converted
from quantkit.producers.compressed_tensors_spec import AWQ, GPTQ, ROUNDING
from quantkit.producers.native_compressed_tensors import tensors_of
from quantkit.producers.package import Asked, Package, Schemes
from quantkit.producers.packages import PackageOptions

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration
    from quantkit.formats.shards import Entry


class LLMCompressorOptions(PackageOptions):
    """How the recipe is put together, and what its modifiers are told; null where it is not theirs.

    The defaults are those of llm-compressor's examples.
    """

    algorithm: Literal["gptq", "awq", "rtn"] | None = None
    """``gptq`` for integers, ``awq`` for those with zero points, ``rtn`` for floats, unless another
    is named."""
    group_size: Literal[32, 64, 128, -1] | None = None
    """Of W4A16, W4A16_ASYM and W8A16: 128 unless named; -1 for a whole channel."""
    smoothing: bool | None = None
    """Of W8A8: whether SmoothQuant comes first, as it does by default before GPTQ."""
    smoothing_strength: float | None = Field(None, ge=0, le=1)
    """Of SmoothQuant: 0.8 unless named."""
    dampening_frac: float | None = Field(None, gt=0, lt=1)
    """Of GPTQ: 0.01 unless named."""
    duo_scaling: Literal["both"] | bool | None = None
    """Of AWQ: whether scales depend on the weights too; ``both``, unless named: try either way."""


class LLMCompressor(Package):
    """https://github.com/vllm-project/llm-compressor: ``oneshot`` with its documented recipes."""

    name = "llm-compressor"
    script = "with_llm_compressor.py"
    schemes: ClassVar[dict[str, Schemes]] = {"compressed-tensors": ((4, 8), (32, 64, 128, -1))}
    options = LLMCompressorOptions

    takes_ignore = True

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """As ``Package.convert``; raise ConversionError where another scheme was written, or the
        tensors do not stand for those of the source."""
        converted = super().convert(checkpoint, spec, calibration, directory)
        _check_scheme(spec, self._read(spec)[0], directory)
        native = replace(spec, options=self._asked(spec).native, producer=registry.NATIVE)
        _check_tensors(spec, tensors_of(checkpoint, native), tensors_in(directory))
        return converted

    def _asked(self, spec: Spec) -> Asked:
        found, options = self._read(spec)
        size = options.group_size
        return Asked(
            PresetScheme.of(found),
            options,
            native=(("algorithm", ROUNDING), *([("group_size", size)] if size else [])),
            calibrates=(
                options.algorithm != ROUNDING
                or options.smoothing is True
                # Scales of activations that are stored.
                or (found.activations is not None and found.activations.dynamic is not True)
            ),
        )

    def _read(self, spec: Spec) -> tuple[Preset, LLMCompressorOptions]:
        """The scheme, and the options as they hold for it."""
        options = self._options(spec)
        assert isinstance(options, LLMCompressorOptions)
        found = preset(spec, options.group_size)
        algorithm = options.algorithm or _usual(found)
        if algorithm != ROUNDING and not found.is_integer:
            raise RecipeError(f"spec {spec}: {algorithm} is for integers; {spec.scheme} takes rtn")
        smooths = found.layout == INT and options.smoothing is not False
        smooths = smooths and (algorithm == GPTQ or options.smoothing is True)
        held: dict[str, Any] = {"algorithm": algorithm}
        for key, of, applies, usual in (
            ("group_size", "W4A16, W4A16_ASYM and W8A16", found.layout == PACKED, 128),
            ("smoothing", "W8A8", found.layout == INT, smooths),
            ("smoothing_strength", "W8A8 with smoothing", smooths, 0.8),
            ("dampening_frac", GPTQ, algorithm == GPTQ, 0.01),
            ("duo_scaling", AWQ, algorithm == AWQ, "both"),
        ):
            given = getattr(options, key)
            if given is not None and not applies:
                raise RecipeError(f"spec {spec}: {key} is for {of}")
            held[key] = usual if applies and given is None else given
        return found, LLMCompressorOptions(**held)


def _usual(found: Preset) -> str:
    if not found.is_integer:
        return ROUNDING
    return GPTQ if found.weights.symmetric else AWQ


def _check_scheme(spec: Spec, asked: Preset, directory: Path) -> None:
    for group in Quantization.opened(directory).config["config_groups"].values():
        parts = [group.get("weights"), group.get("input_activations")]
        written = [Rounding.of(part) if part else None for part in parts]
        if written != [asked.weights, asked.activations]:
            raise ConversionError(
                f"{spec}: the producer wrote another scheme than {asked.name}: {parts}"
            )


def _check_tensors(
    spec: Spec, expected: Iterable[Entry], written: Mapping[str, TensorInfo]
) -> None:
    for entry in expected:
        found = written.get(entry.name)
        if found is None or (found.dtype, found.shape) != (entry.dtype, entry.shape):
            told = f"{found.dtype} {list(found.shape)}" if found else "nothing"
            raise ConversionError(
                f"{spec}: {entry.name} is to be {entry.dtype} {list(entry.shape)}, and the "
                f"producer wrote {told}"
            )
