"""A package as a producer: planned here, run in its toolchain, what it made taken over."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ValidationError

from quantkit import registry, toolchains
from quantkit.errors import ConversionError, RecipeError
from quantkit.formats.packed import bits_of, linears_of
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import GroupScheme, Spec
from quantkit.models.tensors import TensorInfo, tensors_in
from quantkit.producers import load_producer
from quantkit.producers.base import Converted, Plan
from quantkit.producers.job import Job, run, write_token_ids
from quantkit.producers.staging import stage_source, take_over
from quantkit.system.machine import gpu

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration

Schemes = tuple[tuple[int, ...], tuple[int, ...]]
"""Bits and group sizes."""

_SAID = ("torch", "transformers")
"""Packages of the toolchain whose versions the manifest has, besides the producer's."""

_SCALES = ("scales", "weight_scale", "weight_global_scale")
"""Parts of a linear that say how its numbers are scaled: of GPTQ and AWQ, of compressed-tensors."""


@dataclass(frozen=True)
class Asked:
    """A spec, read. ``native``: the options with which quantkit itself would write as many bytes;
    ``calibrates``: whether what is made depends on text."""

    scheme: GroupScheme
    options: BaseModel
    native: tuple[tuple[str, Hashable], ...] = ()
    calibrates: bool = True


class Package:
    """What packages have in common; each says its name, schemes and options."""

    name: ClassVar[str]
    """The name of the producer and of its toolchain."""
    script: ClassVar[str]
    """Beside this file, for ``launcher.py``."""
    schemes: ClassVar[Mapping[str, Schemes]]
    """The schemes that it makes, by format."""
    options: ClassVar[type[BaseModel]]
    """The further options of an entry, under the package's own names."""
    needs_cuda: ClassVar[bool] = False
    transformers_4: ClassVar[bool] = False
    """Whether it reads configurations as transformers 4 wrote them."""
    takes_ignore: ClassVar[bool] = False
    """Whether it has to be told which linears quantkit would leave unquantized."""

    resumes = False

    @property
    def formats(self) -> Collection[str]:
        """As ``Producer.formats``."""
        return self.schemes

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """As ``Producer.plan``; the bytes are those that the native quantizer would write.

        Raise ToolchainError where the package is not installed.
        """
        asked = self._asked(spec)
        if self.needs_cuda and gpu() is None:
            raise ConversionError(
                f"{spec}: {self.name} computes on CUDA only, and there is no NVIDIA GPU here; "
                "leave out `producer`, or use auto-round"
            )
        toolchains.find(self.name)
        native = replace(spec, options=asked.native, producer=registry.NATIVE)
        return replace(
            load_producer(native).plan(checkpoint, native),
            spec=spec,
            needs_calibration=asked.calibrates,
            options=asked.options.model_dump(),
        )

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """As ``Producer.convert``, in a process of the toolchain.

        Raise ConversionError with the package's own reason, or for what it should not have written.
        """
        asked = self._asked(spec)
        used = calibration if asked.calibrates else None
        if used is None and asked.calibrates:
            raise RecipeError(f"{spec}: {self.name} needs calibration text")
        toolchain = toolchains.find(self.name)
        checkpoint.check_finite()
        with TemporaryDirectory(prefix=".job-", dir=directory) as place:
            work = Path(place)
            stage_source(checkpoint, work / "source", transformers_4=self.transformers_4)
            write_token_ids(work / "token_ids.json", used.ids.tolist() if used else [])
            job = Job(
                source=work / "source",
                format=spec.format,
                scheme=spec.scheme,
                bits=asked.scheme.bits,
                group_size=asked.scheme.group_size,
                options=asked.options.model_dump(),
                ignore=_left(checkpoint) if self.takes_ignore else [],
                token_ids=work / "token_ids.json",
                seed=used.record.seed if used else 0,
                device=str(used.device) if used else "cpu",
                output=work / "output",
            )
            script = Path(__file__).parent / self.script
            done = run(self.name, toolchain.python, script, job, str(spec))
            config = take_over(done.directory, checkpoint, directory)
        written = tensors_in(directory)
        packed = linears_of(written)
        _check(spec, packed, written, checkpoint)
        everything, quantized = bits_of(written, checkpoint)
        return Converted(
            bits_per_weight=everything,
            bits_per_weight_quantized=quantized,
            options={
                **done.options,
                "calibration_given": done.calibration,
                "quantization_config": config,
            },
            tools={
                self.name: toolchain.version,
                **{package: toolchain.packages[package] for package in _SAID},
            },
            notes=_unquantized(packed, written, self.name),
            peak_rss_bytes=done.peak_rss_bytes,
        )

    def _asked(self, spec: Spec) -> Asked:
        """Raise RecipeError for what it does not make, or is not told."""
        options = self._options(spec)
        scheme = GroupScheme.parse(replace(spec, options=()), *self.schemes[spec.format])
        return Asked(scheme, options)

    def _options(self, spec: Spec) -> BaseModel:
        if spec.format not in self.schemes:
            raise RecipeError(
                f"spec {spec}: {self.name} makes {' and '.join(self.schemes)}; "
                "leave out `producer`, or name another"
            )
        given = spec.known_options(tuple(self.options.model_fields))
        try:
            return self.options.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            raise RecipeError(f"spec {spec}: {first['loc'][0]}: {first['msg']}") from error


def _left(checkpoint: Checkpoint) -> list[str]:
    """The matrices that quantkit does not quantize, as ``Job.ignore``."""
    from quantkit.decoder.blocks import DecoderBlocks
    from quantkit.producers.integer_linears import Names

    names = Names.of(DecoderBlocks(checkpoint))
    beside = [rf"re:(.*\.)?{re.escape(part)}\..*" for part in names.beside]
    return list(dict.fromkeys([*names.routers, *names.outside, *beside, "lm_head"]))


def _check(
    spec: Spec, packed: list[str], written: Mapping[str, TensorInfo], checkpoint: Checkpoint
) -> None:
    """Raise ConversionError where nothing is quantized, or a scale is not a number."""
    from safetensors import safe_open

    if not packed:
        raise ConversionError(f"{spec}: the producer quantized nothing")
    unknown = [name for name in packed if f"{name}.weight" not in checkpoint.tensors]
    if unknown:
        raise ConversionError(
            f"{spec}: the producer wrote {unknown[0]}, which the source does not have"
        )
    for name in packed:
        for info in (written[f"{name}.{part}"] for part in _SCALES if f"{name}.{part}" in written):
            with safe_open(info.shard, framework="pt") as shard:
                if not shard.get_tensor(info.name).float().isfinite().all():
                    raise ConversionError(f"{spec}: the producer's scales of {name} are not finite")


def _unquantized(
    packed: list[str], written: Mapping[str, TensorInfo], package: str
) -> tuple[str, ...]:
    """A note of block linears that the package left as they were."""
    quantized = set(packed)
    kinds = {name.rpartition(".")[2] for name in packed}
    weights = (name.removesuffix(".weight") for name in written if name.endswith(".weight"))
    left = [name for name in weights if name.rpartition(".")[2] in kinds and name not in quantized]
    if not left:
        return ()
    return (
        f"{package} left {len(left)} of {len(left) + len(packed)} linears unquantized, for example "
        f"{left[0]}",
    )
