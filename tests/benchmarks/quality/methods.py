"""The methods: who makes a variant, and its weights unpacked.

What makes a variant is imported when it is asked for: the others, and the scoring, run without it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open

from tests.benchmarks.quality import rounding
from tests.benchmarks.quality.oracle import InputRounding
from tests.plain_weights import plain_weights

Grid = Literal["symmetric", "asymmetric"]
_JOB = Path(__file__).with_name("llm_compressor_job.py")


class Absent(Exception):
    """What makes the variant is not here; the message says what is missing."""


@dataclass(frozen=True)
class Job:
    """What a method is given. ``ids``: (samples, length) int64; ``work``: an empty directory."""

    source: Path
    scheme: str
    ids: torch.Tensor
    calibration: str
    device: str
    iters: int
    work: Path
    commit: str
    llm_compressor: Path | None

    @property
    def group_size(self) -> int:
        """Of ``w4g64``."""
        return int(self.scheme.partition("g")[2])


@dataclass(frozen=True)
class Made:
    """A variant: its plain weights by name, and what it cost."""

    state: Iterable[tuple[str, torch.Tensor]]
    bits_per_weight: float
    bits_per_weight_quantized: float | None
    seconds: float | None
    inputs: InputRounding | None = None


class Method(Protocol):
    """One row. ``grid``: which rounding it is measured against, None where that has no meaning."""

    label: str
    grid: Grid | None
    calibrates: bool
    learns: bool

    def scheme(self, scheme: str) -> str:
        """What it makes where ``scheme`` is asked for."""
        ...

    def maker(self, job: Job) -> str:
        """Who makes it, with the version; raise Absent where that is not here."""
        ...

    def make(self, job: Job) -> Made:
        """Make the variant."""
        ...


class _Groups:
    """Methods that take bits and group size as they are asked for."""

    def scheme(self, scheme: str) -> str:
        return scheme


@dataclass(frozen=True)
class Rounding(_Groups):
    """Of this benchmark itself."""

    label: str
    grid: Grid
    calibrates: bool = False
    learns: bool = False

    def maker(self, job: Job) -> str:
        return ""

    def make(self, job: Job) -> Made:
        from quantkit.models.checkpoint import Checkpoint
        from quantkit.models.spec import Spec
        from quantkit.producers import load_producer

        symmetric = self.grid == "symmetric"
        spec = Spec("gptq" if symmetric else "awq", job.scheme)
        planned = load_producer(spec).plan(Checkpoint.open(job.source), spec)
        state = rounding.rounded(job.source, 4, job.group_size, symmetric=symmetric)
        return Made(state, planned.bits_per_weight, None, None)


@dataclass(frozen=True)
class Converted(_Groups):
    """GPTQ and AWQ through ``convert``: quantkit's own, or a package in its toolchain."""

    label: str
    format: str
    learns: bool = False
    producer: str = "native"
    calibrates: bool = True

    @property
    def grid(self) -> Grid:
        return "symmetric" if self.format == "gptq" else "asymmetric"

    def maker(self, job: Job) -> str:
        if self.producer == "native":
            return f"quantkit {job.commit}"
        from quantkit import toolchains
        from quantkit.errors import ToolchainError

        try:
            return f"{self.producer} {toolchains.find(self.producer).version}"
        except ToolchainError as error:
            raise Absent(str(error)) from error

    def make(self, job: Job) -> Made:
        options: dict[str, Any] = {"iters": job.iters} if self.learns else {}
        if self.learns and self.producer == "native":
            options["rounding"] = "learned"
        variant = _convert(job, self.format, job.scheme, options, self.producer)

        state = plain_weights(variant.path)
        return _costing(variant, state)


@dataclass(frozen=True)
class LlamaCpp:
    """One of llama.cpp's types, through quantkit's own conversion, unpacked as ggml does."""

    type: str
    imatrix: bool = False
    grid: Grid | None = None
    learns: bool = False

    @property
    def label(self) -> str:
        return "llama.cpp, imatrix" if self.imatrix else "llama.cpp"

    @property
    def calibrates(self) -> bool:
        return self.imatrix

    def scheme(self, scheme: str) -> str:
        return self.type

    def maker(self, job: Job) -> str:
        return f"llama.cpp {version('llama-cpp-python')}"

    def make(self, job: Job) -> Made:
        options = {"imatrix": True} if self.imatrix else {}
        variant = _convert(job, "gguf", self.type, options)
        from quantkit.formats.gguf.unpacked import UnpackedGGUF
        from quantkit.models.checkpoint import Checkpoint

        unpacked = UnpackedGGUF.of(Checkpoint.open(job.source), variant.weights)
        return _costing(variant, ((name, unpacked.read(name)) for name in unpacked.tensors))


@dataclass(frozen=True)
class LLMCompressor:
    """llm-compressor, in an environment of its own; ``modifier``: its recipe. ``preset``: a scheme
    of compressed-tensors, else the bits and groups that are asked for."""

    label: str
    modifier: str
    grid: Grid
    calibrates: bool = True
    learns: bool = False
    preset: str = ""

    def scheme(self, scheme: str) -> str:
        return self.preset or scheme

    def maker(self, job: Job) -> str:
        if job.llm_compressor is None:
            raise Absent(f"{self.label}: name its Python with --llm-compressor")
        code = "from importlib.metadata import version; print(version('llmcompressor'))"
        found = subprocess.check_output([job.llm_compressor, "-I", "-c", code], text=True)
        return f"llm-compressor {found.strip()}"

    def make(self, job: Job) -> Made:
        from quantkit.formats.packed import bits_of
        from quantkit.models.checkpoint import Checkpoint
        from quantkit.models.tensors import tensors_in

        order, out = job.work / "job.json", job.work / "made"
        given = {
            "source": str(job.source.absolute()),
            "modifier": self.modifier,
            "scheme": self.preset or ("W4A16" if self.grid == "symmetric" else "W4A16_ASYM"),
            "group_size": job.group_size,
            "ids": job.ids.tolist(),
            "output": str(out.absolute()),
            "result": str((job.work / "result.json").absolute()),
        }
        order.write_text(json.dumps(given))
        assert job.llm_compressor is not None
        with (job.work / "log").open("w+", encoding="utf-8") as log:
            done = subprocess.run(
                [job.llm_compressor, "-I", _JOB, order], stdout=log, stderr=log, check=False
            )
            if done.returncode:
                log.seek(0)
                raise RuntimeError(f"llm-compressor failed:\n{log.read()[-4000:]}")
        # Without a tokenizer quantkit opens no checkpoint.
        shutil.copy(job.source / "tokenizer.json", out)
        seconds = json.loads((job.work / "result.json").read_text())["seconds"]
        everything, linears = bits_of(tensors_in(out), Checkpoint.open(job.source))
        return Made(plain_weights(out), everything, linears, seconds, _inputs(out))


@dataclass(frozen=True)
class Compressed:
    """A scheme of compressed-tensors, whatever bits and groups are asked for: quantkit's own."""

    label: str
    preset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    calibrates: bool = False
    grid: Grid | None = None
    learns: bool = False

    def scheme(self, scheme: str) -> str:
        return self.preset

    def maker(self, job: Job) -> str:
        return f"quantkit {job.commit}"

    def make(self, job: Job) -> Made:
        variant = _convert(job, "compressed-tensors", self.preset, dict(self.options))
        made = _costing(variant, plain_weights(variant.path))
        return replace(made, inputs=_inputs(variant.path))


def _inputs(path: Path) -> InputRounding | None:
    """What a checkpoint of compressed-tensors says of the inputs of its linears."""
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    arguments = group["input_activations"]
    if arguments is None:
        return None
    known = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype")
    file = path / "model.safetensors"
    with safe_open(file, framework="pt") as stored:
        ends = [name.rpartition(".")[::2] for name in stored.keys()]  # noqa: SIM118
        linears = frozenset(linear for linear, part in ends if part == "weight_scale")
        wholes = {
            linear: stored.get_tensor(f"{linear}.{part}")
            for linear, part in ends
            if part == "input_global_scale"
        }
    return InputRounding(linears, {k: arguments[k] for k in known if k in arguments}, wholes)


_SCHEMES: dict[str, Method] = {
    "w8a8": Compressed("W8A8, smoothed, GPTQ", "W8A8", calibrates=True),
    "w8a8-plain": Compressed("W8A8, GPTQ", "W8A8", {"smoothing": False}, calibrates=True),
    "w8a8-rtn": Compressed("W8A8, rounding", "W8A8", {"algorithm": "rtn"}),
    "llmc-w8a8": LLMCompressor(
        "llm-compressor, SmoothQuant and GPTQ", "smoothquant", "symmetric", preset="W8A8"
    ),
    "llmc-w8a8-rtn": LLMCompressor("llm-compressor, rounding", "rtn", "symmetric", preset="W8A8"),
    **{
        method: one
        for name in ("FP8_DYNAMIC", "NVFP4A16", "NVFP4", "MXFP4")
        for method, one in {
            name.lower(): Compressed(
                f"{name}, best scale", name, {"algorithm": "best-scale"}, name == "NVFP4"
            ),
            f"{name.lower()}-rtn": Compressed(
                f"{name}, rounding", name, {"algorithm": "rtn"}, name == "NVFP4"
            ),
            f"llmc-{name.lower()}": LLMCompressor(
                "llm-compressor, rounding", "rtn", "symmetric", preset=name
            ),
        }.items()
    },
}
_TYPES = ("Q4_0", "IQ4_NL", "IQ4_XS", "Q4_K_M")
METHODS: dict[str, Method] = {
    "rtn-symmetric": Rounding("rounding, symmetric", "symmetric"),
    "gptq": Converted("GPTQ", "gptq"),
    "gptq-learned": Converted("GPTQ, learned", "gptq", learns=True),
    "autoround-symmetric": Converted("AutoRound, symmetric", "gptq", True, "auto-round"),
    "llmc-gptq": LLMCompressor("llm-compressor GPTQ", "gptq", "symmetric"),
    "rtn-asymmetric": Rounding("rounding, asymmetric", "asymmetric"),
    "awq": Converted("AWQ", "awq"),
    "awq-learned": Converted("AWQ, learned", "awq", learns=True),
    "autoround-asymmetric": Converted("AutoRound, asymmetric", "awq", True, "auto-round"),
    "autoawq": Converted("AutoAWQ", "awq", producer="autoawq"),
    "llmc-awq": LLMCompressor("llm-compressor AWQ", "awq", "asymmetric"),
    **{t.lower(): LlamaCpp(t) for t in _TYPES},
    **{f"{t.lower()}-imatrix": LlamaCpp(t, imatrix=True) for t in _TYPES},
    **_SCHEMES,
}


def _convert(
    job: Job, format_: str, scheme: str, options: dict[str, Any], producer: str = "native"
) -> Any:
    """The variant, made by ``quantkit.producers.convert`` of the job's own token ids."""
    from quantkit.data.calibration import Calibration, hash_ids
    from quantkit.models.checkpoint import Checkpoint
    from quantkit.models.spec import Spec
    from quantkit.models.variant import CalibrationRecord
    from quantkit.producers.convert import convert
    from quantkit.system import devices

    samples, length = job.ids.shape
    record = CalibrationRecord(
        dataset=job.calibration,
        revision=None,
        samples=samples,
        sequence_length=length,
        seed=0,
        sha256=hash_ids(job.ids.flatten().tolist()),
    )
    device = devices.choose(job.device)
    windows = Calibration(job.ids, record, device, devices.precision("auto", device))
    spec = Spec(format_, scheme).by(producer).having(options)
    return convert(Checkpoint.open(job.source), spec, windows, job.work)


def _costing(variant: Any, state: Iterable[tuple[str, torch.Tensor]]) -> Made:
    """The unpacked variant with the figures of its manifest."""
    manifest = variant.manifest
    return Made(
        state,
        manifest.bits_per_weight,
        manifest.bits_per_weight_quantized,
        manifest.convert.seconds,
    )
