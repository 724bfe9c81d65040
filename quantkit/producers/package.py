"""A package as the producer of GPTQ or AWQ: planned here, run in its toolchain, taken over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
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

    resumes = False

    @property
    def formats(self) -> Collection[str]:
        """As ``Producer.formats``."""
        return self.schemes

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """As ``Producer.plan``; the bytes are those that the native quantizer would write.

        Raise ToolchainError where the package is not installed.
        """
        _, options = self._parse(spec)
        if self.needs_cuda and gpu() is None:
            raise ConversionError(
                f"{spec}: {self.name} computes on CUDA only, and there is no NVIDIA GPU here; "
                "leave out `producer`, or use auto-round"
            )
        toolchains.find(self.name)
        native = load_producer(replace(spec, options=(), producer=registry.NATIVE)).plan(
            checkpoint, replace(spec, options=())
        )
        return replace(native, spec=spec, options=options.model_dump())

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """As ``Producer.convert``, in a process of the toolchain.

        Raise ConversionError with the package's own reason, or for what it should not have written.
        """
        if calibration is None:
            raise RecipeError(f"{spec}: {self.name} needs calibration text")
        scheme, options = self._parse(spec)
        toolchain = toolchains.find(self.name)
        checkpoint.check_finite()
        with TemporaryDirectory(prefix=".job-", dir=directory) as place:
            work = Path(place)
            stage_source(checkpoint, work / "source", transformers_4=self.transformers_4)
            write_token_ids(work / "token_ids.json", calibration.ids.tolist())
            job = Job(
                source=work / "source",
                format=spec.format,
                bits=scheme.bits,
                group_size=scheme.group_size,
                options=options.model_dump(),
                token_ids=work / "token_ids.json",
                seed=calibration.record.seed,
                device=str(calibration.device),
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

    def _parse(self, spec: Spec) -> tuple[GroupScheme, BaseModel]:
        if spec.format not in self.schemes:
            raise RecipeError(
                f"spec {spec}: {self.name} makes {' and '.join(self.schemes)}; "
                "leave out `producer`, or name another"
            )
        scheme = GroupScheme.parse(replace(spec, options=()), *self.schemes[spec.format])
        given = spec.known_options(tuple(self.options.model_fields))
        try:
            return scheme, self.options.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            raise RecipeError(f"spec {spec}: {first['loc'][0]}: {first['msg']}") from error


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
        info = written[f"{name}.scales"]
        with safe_open(info.shard, framework="pt") as shard:
            if not shard.get_tensor(info.name).isfinite().all():
                raise ConversionError(f"{spec}: the producer's scales of {name} are not finite")


def _unquantized(
    packed: list[str], written: Mapping[str, TensorInfo], package: str
) -> tuple[str, ...]:
    """A note of block linears that the package left as they were."""
    kinds = {name.rpartition(".")[2] for name in packed}
    left = [
        name.removesuffix(".weight")
        for name in written
        if name.endswith(".weight") and name.split(".")[-2] in kinds
    ]
    if not left:
        return ()
    return (
        f"{package} left {len(left)} of {len(left) + len(packed)} linears unquantized, for example "
        f"{left[0]}",
    )
