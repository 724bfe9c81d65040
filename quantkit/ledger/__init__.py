"""``ledger.json``: all the numbers of a run, and how each was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import EvaluationError
from quantkit.ledger.drift import Comparison, Profile
from quantkit.ledger.load import Bench, Goodput, MemoryBandwidth, RateBench
from quantkit.ledger.loss import Loss, NoiseFloor
from quantkit.ledger.prompt_drift import PromptDrift
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.engine_config import EngineConfig
from quantkit.models.merge_record import MergeRecord
from quantkit.models.variant import CalibrationRecord, ConvertCost
from quantkit.system.files import write_json
from quantkit.system.table import Cell, Table, Tabular

LEDGER = "ledger.json"
"""Its name in the directory of a run."""
REFERENCE = "reference"
"""The id of the first row: the source itself."""
_ACCURACY = re.compile(r"(?!prompts_).*(_acc|_exact_match(_.+)?)")
"""``mmlu_acc``, ``gsm8k_exact_match_strict-match``, where the end is the name of a filter."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metric(_Entry):
    """One number: its error, over how many tokens or items, and how it was measured.

    ``reference`` is the id of the row it is a drift from, None for an absolute number.
    Two metrics may be compared only where their ``protocol`` is equal.
    """

    value: float
    stderr: float | None
    n: int
    reference: str | None
    protocol: dict[str, Any]
    engine: EngineConfig


class OnText(_Entry):
    """What was measured on one text, and where on it a variant drifted."""

    metrics: dict[str, Metric]
    profile: Profile | None = None


class Sample(_Entry):
    """What the serving engine wrote after a fixed prompt, greedily: numbers that talk nonsense
    are worth nothing, so the text is kept beside them."""

    prompt: str
    completion: str


class Failure(_Entry):
    """Why a row is incomplete: the stage that failed and its error in one line."""

    stage: str
    error: str


class Row(_Entry):
    """One variant, or the reference."""

    id: str
    spec: str
    """``gptq:w4g64``; for the reference ``safetensors:bf16``."""
    path: str
    bytes: int | None = None
    bits_per_weight: float | None = None
    bits_per_weight_quantized: float | None = None
    convert: ConvertCost | None = None
    notes: list[str] = Field(default_factory=list)
    texts: dict[str, OnText] = Field(default_factory=dict)
    """Metrics by text, in the order of the ledger's ``texts``."""
    metrics: dict[str, Metric] = Field(default_factory=dict)
    """Metrics of tasks and prompts."""
    prompts: PromptDrift | None = None
    loss: Loss | None = None
    bench: list[Bench] = Field(default_factory=list)
    """Closed loops: one for each engine and concurrency."""
    rates: list[RateBench] = Field(default_factory=list)
    """Open loops: one for each engine and rate."""
    goodput: list[Goodput] = Field(default_factory=list)
    """One for each engine, where the recipe states an objective."""
    sample: Sample | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    """Wall time of each stage in the run that wrote this: ``convert``, ``evaluate``, ``bench`` …;
    work that an earlier run did is not in it."""
    failed: Failure | None = None

    def by_text(self, name: str) -> dict[str, Metric]:
        """One metric, such as ``kld_mean``, on each text that has it."""
        return {text: one.metrics[name] for text, one in self.texts.items() if name in one.metrics}

    def metric(self, name: str, text: str | None = None) -> Metric | None:
        """On a text, or of a task or prompts; None where it was not measured."""
        if text is None:
            return self.metrics.get(name)
        return self.by_text(name).get(text)

    @property
    def all_metrics(self) -> Iterator[tuple[str | None, str, Metric]]:
        """The text or None, the name, and the metric of everything that was measured."""
        for text, one in self.texts.items():
            yield from ((text, name, metric) for name, metric in one.metrics.items())
        yield from ((None, name, metric) for name, metric in self.metrics.items())


class Environment(_Entry):
    """The machine and the tools; ``tools`` is versions by package."""

    cpu: str
    cores: int
    gpu: str | None
    memory_bytes: int
    platform: str
    tools: dict[str, str]
    memory_bandwidth: MemoryBandwidth | None = None
    """None where nothing was benched, or where it could not be measured."""


class SourceEntry(_Entry):
    """The checkpoint that everything was made from; ``sha256`` by file name."""

    id: str
    revision: str | None
    architecture: str
    parameters: int
    sha256: dict[str, str]
    origin: str | None
    """What the weights are, where a reader must know it to read the numbers."""
    merged: MergeRecord | None = None
    """The base and the LoRA adapter, where it was merged from these."""

    @classmethod
    def of(cls, source: Checkpoint) -> SourceEntry:
        """Describe an opened checkpoint."""
        return cls(
            id=source.id,
            revision=source.revision,
            architecture=source.architecture,
            parameters=source.parameters,
            sha256=source.sha256,
            origin=source.origin,
            merged=source.merged,
        )


class TextEntry(_Entry):
    """A text that was evaluated on; ``sha256`` of the token ids as little-endian int32."""

    name: str
    """What the rows call it."""
    dataset: str
    revision: str | None
    tokens: int
    sha256: str


class Ledger(Tabular, _Entry):
    """A whole run. The first row is the source itself, with the id ``reference``."""

    schema_version: Literal[5] = 5
    name: str
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float
    """Wall time of the run that wrote this; work that an earlier run did is not in it."""
    source: SourceEntry
    environment: Environment
    recipe: dict[str, Any]
    """The recipe as resolved, with every default."""
    calibration: CalibrationRecord | None
    texts: list[TextEntry]
    variants: list[Row]
    comparisons: list[Comparison] = Field(default_factory=list)
    """Every pair of rows in every measure, on each text separately, ``a`` before ``b`` in the order
    of ``variants``."""
    noise_floor: list[NoiseFloor] = Field(default_factory=list)
    """What each serving engine does to the source, where losses are split."""

    @property
    def reference(self) -> Row:
        """The source's own row."""
        return self.variants[0]

    @property
    def failed(self) -> bool:
        """Whether any row is incomplete."""
        return any(row.failed for row in self.variants)

    def table(self) -> Table:
        """One row a variant: what it takes, what it lost on each text, what it delivers."""
        return Table.of_records([_record(row, len(self.texts) > 1) for row in self.variants])

    def write(self, path: Path) -> None:
        """Write in one rename. A non-finite number is refused: count it, don't write it."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def of_run(cls, directory: Path) -> Ledger:
        """That of a run's directory; see ``read``."""
        return cls.read(directory / LEDGER)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Raise EvaluationError where the file is absent or not a ledger of this version."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise EvaluationError(f"{path}: no such file; `quantkit run` writes it") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise EvaluationError(
                f"{path}: not a ledger this version reads: {where}: {first['msg']}; "
                "`quantkit run` on the same directory brings it up to date"
            ) from error
        except UnicodeDecodeError as error:
            raise EvaluationError(f"{path}: not a ledger: {error}") from error


def _record(row: Row, several_texts: bool) -> dict[str, Cell]:
    found: dict[str, Cell] = {
        "variant": row.id,
        "spec": row.spec,
        "bytes": row.bytes,
        "bits_per_weight": row.bits_per_weight,
    }
    for text, name, metric in row.all_metrics:
        if text is None or name in ("ppl", "kld_mean", "top1_agreement"):
            found[f"{name} {text}" if text and several_texts else name] = metric.value
    for bench in row.bench:
        found[f"output_tokens_per_s {bench.engine.id} @{bench.concurrency}"] = (
            bench.output_tokens_per_s
        )
    if row.failed:
        found["failed"] = f"{row.failed.stage}: {row.failed.error}"
    return found


def is_accuracy(name: str) -> bool:
    """Whether a metric is, by its name, the share of a task's questions that were answered right:
    with the right choice, or with the expected words."""
    return _ACCURACY.fullmatch(name) is not None


def require_comparable(name: str, one: Metric, other: Metric) -> None:
    """Raise EvaluationError where two results were not measured in the same way.

    The protocol holds the ``metrics_version``, so results of two versions are refused as well.
    """
    if one.protocol == other.protocol:
        return
    keys = sorted(one.protocol.keys() | other.protocol.keys())
    differences = (
        f"{key}: {one.protocol.get(key)!r} and {other.protocol.get(key)!r}"
        for key in keys
        if one.protocol.get(key) != other.protocol.get(key)
    )
    raise EvaluationError(
        f"{name}: measured in two ways, which are not compared ({'; '.join(differences)}); "
        "evaluate both again with the same settings"
    )
