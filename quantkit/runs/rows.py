"""A row of the ledger in the making: one model, and the result of each of its stages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from quantkit.benchmark.measured import BenchResult
from quantkit.errors import QuantkitError
from quantkit.evaluation.samples import Evaluated
from quantkit.formats import load_format
from quantkit.ledger import REFERENCE, Failure, OnText, Row
from quantkit.ledger.loss import Loss
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Model
from quantkit.runs.external import ExternalVariant
from quantkit.system.progress import say

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class RowBuilder:
    """Collects what the stages find out about one model; ``row()`` is what the ledger keeps."""

    id: str
    spec: str
    path: str
    """The path in the ledger; relative to the run's directory for what was made here."""
    model: Model | None = None
    evaluated: Evaluated = field(default_factory=Evaluated)
    loss: Loss | None = None
    benched: BenchResult = field(default_factory=BenchResult)
    failed: Failure | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage, in this run."""

    @classmethod
    def of_source(cls, source: Checkpoint) -> RowBuilder:
        """The first row: what every other one is compared with."""
        return cls(REFERENCE, f"{source.format}:{source.scheme}", str(source.path), source)

    @classmethod
    def of_variant(cls, entry: Spec | ExternalVariant) -> RowBuilder:
        """The row of a variant that is still to be made, or opened."""
        made = f"variants/{entry.directory}"
        return cls(
            entry.directory, str(entry), entry.path if isinstance(entry, ExternalVariant) else made
        )

    def attempt(self, stage: str, work: Callable[[], T]) -> T | None:
        """The result of ``work()``; None where it fails: the row keeps the first reason, and the
        run goes on. Only the user's interrupt passes through."""
        try:
            with self.timed(stage):
                return work()
        except Exception as error:
            self._note(stage, error)
            return None

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the time of the block as that stage's."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started

    def _note(self, stage: str, error: Exception) -> None:
        line = str(error) if isinstance(error, QuantkitError) else repr(error)
        say(f"{self.id}: {stage} failed: {line}")
        _LOG.debug("%s: %s", self.id, stage, exc_info=True)
        self.failed = self.failed or Failure(stage=stage, error=line)

    def load(self, measure: Callable[[], BenchResult]) -> None:
        """Put the model under load: what was measured before an error is kept beside it."""
        self.benched = self.attempt("bench", measure) or self.benched
        if self.benched.error:
            say(f"{self.id}: bench failed: {self.benched.error}")
            self.failed = self.failed or Failure(stage="bench", error=self.benched.error)

    def row(self, source: Checkpoint) -> Row:
        """The finished row: what was measured is in it also where its files cannot be described."""
        facts = Row(id=self.id, spec=self.spec, path=self.path)
        try:
            facts = self._facts(self.model, source) if self.model else facts
        except Exception as error:
            self._note("describe", error)
        return facts.model_copy(
            update={
                "texts": {
                    name: OnText(metrics=one.metrics, profile=one.profile)
                    for name, one in self.evaluated.texts.items()
                },
                "metrics": self.evaluated.metrics,
                "prompts": self.evaluated.prompts,
                "loss": self.loss,
                "bench": self.benched.benches,
                "rates": self.benched.rates,
                "goodput": self.benched.goodput,
                "sample": self.benched.sample,
                "seconds": self.seconds,
                "failed": self.failed,
            }
        )

    def _facts(self, made: Model, source: Checkpoint) -> Row:
        """What the files alone say."""
        if isinstance(made, Checkpoint):
            return Row(
                id=self.id,
                spec=self.spec,
                path=self.path,
                bytes=made.bytes,
                bits_per_weight=made.bytes * 8 / source.parameters,
            )
        if made.manifest is None:
            everything, quantized = load_format(made.format).bits_per_weight(made, source)
            return Row(
                id=self.id,
                spec=str(made.spec),
                path=str(made.path),
                bytes=made.bytes,
                bits_per_weight=everything,
                bits_per_weight_quantized=quantized,
                notes=[f"not made here: {self.spec}"],
            )
        return Row(
            id=self.id,
            spec=self.spec,
            path=self.path,
            bytes=made.bytes,
            bits_per_weight=made.manifest.bits_per_weight,
            bits_per_weight_quantized=made.manifest.bits_per_weight_quantized,
            convert=made.manifest.convert,
            notes=made.manifest.notes,
        )
