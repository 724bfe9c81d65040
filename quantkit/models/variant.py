"""A variant on disk: its manifest, and opening whatever an engine can load."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import CheckpointError
from quantkit.models import weight_files
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.merge_record import MergeRecord
from quantkit.models.spec import Spec
from quantkit.system.files import sha256_file, sha256_files

MANIFEST = "quantkit.json"
SETTINGS = ("quantize_config.json", "quant_config.json")
"""Where AutoGPTQ and AutoAWQ wrote their settings before config.json had them."""
IMATRIX = "imatrix.gguf"
"""The importance matrix that lies beside a GGUF variant that was made with one."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceRecord(_Record):
    """What a variant was made from; ``sha256`` by path in its directory."""

    id: str
    revision: str | None
    sha256: dict[str, str]
    merged: MergeRecord | None = None
    """The base and the LoRA adapter, where it was merged from these."""


class KindRecord(_Record):
    """One kind of text in a mix: where it came from, its share as asked for, and what it gave."""

    kind: str
    dataset: str
    revision: str | None
    share: float
    samples: int


class CalibrationRecord(_Record):
    """The tokens that a quantizer saw; ``sha256`` of the ids as little-endian int32."""

    dataset: str
    revision: str | None
    samples: int
    sequence_length: int
    seed: int
    sha256: str
    template: str | None = None
    """sha256 of the chat template that conversations were rendered in."""
    kinds: list[KindRecord] = Field(default_factory=list)
    """The parts of the mix that ``dataset`` names; empty where it was one text."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """All that the tokens came from."""
        return tuple(kind.dataset for kind in self.kinds) or (self.dataset,)


class FileRecord(_Record):
    """One file of a variant."""

    sha256: str
    bytes: int


class ConvertCost(_Record):
    """What making the variant took: wall seconds, in all and by stage where the format counts
    them, peak resident bytes of the process, and peak bytes on the GPU where one was used."""

    seconds: float
    peak_rss_bytes: int
    device: str | None = None
    """Where calibration and quantization ran: ``cpu``, or the GPU's name."""
    precision: str | None = None
    """What matrix products were computed in there: ``bfloat16``."""
    peak_device_bytes: int | None = None
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    variants: int = 1
    """How many variants the same pass over the source made: seconds and peaks are of all."""


class ProofRecord(_Record):
    """What was compared with the source when the variant was made. ``differences``, one line each:
    those that the user allowed, and those that change nothing in ordinary use."""

    compared: int
    """Texts, conversations or the like."""
    differences: list[str] = Field(default_factory=list)


class DeviationRecord(_Record):
    """As ``quantkit.quantize.deviation.Deviation``."""

    error: float
    gain: float
    mean_error: float


class BlockRecord(_Record):
    """How far a quantized block's output is from the float block's, on calibration text and on
    each kind of text that it was not quantized by."""

    calibration: DeviationRecord
    held_out: dict[str, DeviationRecord] = Field(default_factory=dict)


class FoldRecord(_Record):
    """A norm or linear that can take a scale from ``balance_layers``, the linears that read its
    output; ``offset`` is what a norm adds to its weight."""

    smooth_layer: str
    balance_layers: list[str]
    offset: float


class StructureRecord(_Record):
    """What decoder blocks are made of, found and proved on them, by names in a block; ``*`` is
    each expert."""

    blocks: list[int]
    inputs: list[list[str]]
    """Linears with one input."""
    writers: list[str]
    """Linears that add to the residual stream."""
    folds: list[FoldRecord]
    unfolded: dict[str, str]
    """Linears from which nothing takes a scale, and why."""


class LossRecord(_Record):
    """As ``quantkit.quantize.held_out.Loss``: mean KL divergence from the source, nats."""

    kld: float
    rounding_kld: float


class Manifest(_Record):
    """``quantkit.json``: what a variant is, what it was made from, and how."""

    schema_version: int = 2
    source: SourceRecord
    spec: dict[str, Any]
    """``format``, ``scheme``, ``producer`` and every resolved option of the quantizer."""
    calibration: CalibrationRecord | None
    tools: dict[str, str]
    files: dict[str, FileRecord]
    parameters: int
    bits_per_weight: float
    """Bytes of all tensors x 8 / number of parameters."""
    bits_per_weight_quantized: float | None
    """The same over the quantized linears only; None where there is none."""
    convert: ConvertCost
    blocks: list[BlockRecord] = Field(default_factory=list)
    """Decoder blocks in their order, where one after another was quantized."""
    structure: list[StructureRecord] = Field(default_factory=list)
    """The structure found, by kind of block, where blocks were asked."""
    held_out: dict[str, LossRecord] = Field(default_factory=dict)
    """Losses by kind of held-out text, beside those of rounding to nearest."""
    proof: dict[str, ProofRecord] = Field(default_factory=dict)
    """Results of the proofs, by what was proved: ``tokens``."""
    notes: list[str] = Field(default_factory=list)
    """What a reader should know, for example which tensors fell back to another type."""
    override_kv: dict[str, int] = Field(default_factory=dict)
    """Metadata that llama-server is started with, as the GGUF itself cannot say it."""
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Variant:
    """Weights in one format; made by quantkit (then it has a manifest) or by somebody else."""

    id: str
    path: Path
    """The variant's directory, or a bare GGUF file."""
    format: str
    scheme: str
    manifest: Manifest | None
    files: tuple[Path, ...] = ()
    """What an engine is given of the directory, the first alone or all parts; empty: all of it."""

    @property
    def spec(self) -> Spec:
        """Format and scheme."""
        return Spec(self.format, self.scheme)

    @property
    def weights(self) -> Path:
        """What an engine is given to load: a file, the first part of several, or the directory."""
        return self.files[0] if self.files else self.path

    @property
    def bytes(self) -> int:
        """Bytes of the weight files on disk."""
        files = self.files or weight_files.find(self.path).files
        return sum(file.stat().st_size for file in files)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Digests by path in the directory: the manifest's, or else of what lies there."""
        if self.manifest is not None:
            return {name: file.sha256 for name, file in self.manifest.files.items()}
        files = set(self.files)
        if not files:
            checkpoint = Checkpoint.open(self.path)
            files = {info.shard for info in checkpoint.tensors.values()}
            settings = filter(Path.is_file, (self.path / name for name in SETTINGS))
            files |= {self.path / "config.json", *checkpoint.sidecars, *settings}
        home = self.files[0].parent if self.files else self.path
        digests = sha256_files(sorted(files))
        return {str(file.relative_to(home)): digest for file, digest in digests.items()}


Model = Checkpoint | Variant
"""Anything that an engine loads: has ``id``, ``format``, ``scheme``, ``path``, ``weights``."""


def tokenizer_directory(model: Model) -> Path:
    """Where a model's tokenizer files are, if it has any: a bare GGUF file has its own inside."""
    return model.path.parent if model.path.is_file() else model.path


def read_manifest(path: Path) -> Manifest:
    """Raise CheckpointError where the file is not a manifest that this version reads."""
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise CheckpointError(
            f"{path}: not a manifest this version reads: {f'{where}: ' if where else ''}"
            f"{problem['msg']}"
        ) from error
    for key in ("format", "scheme"):
        if not isinstance(manifest.spec.get(key), str):
            raise CheckpointError(f"{path}: not a manifest: its spec has no {key}")
    return manifest


def verify(variant: Variant) -> list[str]:
    """Every way in which the files differ from the manifest, one line each; empty when none."""
    if variant.manifest is None:
        raise CheckpointError(f"{variant.path}: has no {MANIFEST}, so there is nothing to verify")
    problems = []
    for name, record in variant.manifest.files.items():
        file = variant.path / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != record.bytes:
            problems.append(f"{name}: {file.stat().st_size} bytes, expected {record.bytes}")
        elif sha256_file(file) != record.sha256:
            problems.append(f"{name}: sha256 differs")
    known = {MANIFEST, *variant.manifest.files}
    found = {str(f.relative_to(variant.path)) for f in variant.path.rglob("*") if f.is_file()}
    return problems + [f"{name}: not in the manifest" for name in sorted(found - known)]
