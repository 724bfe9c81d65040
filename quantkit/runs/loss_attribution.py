"""The stage of a run that says where each variant's loss comes from, and what is only noise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from quantkit.engines import load_engine, scoring_engine, serving_engine
from quantkit.engines.base import Engine, config_of, serving
from quantkit.errors import ConversionError, IncompatibleVariant, ToolchainError
from quantkit.evaluation.samples import METRICS_VERSION, Evaluated, MeasuredText
from quantkit.formats import load_format
from quantkit.formats.base import QuantizesInputs
from quantkit.formats.gguf import architectures
from quantkit.ledger.loss import Loss, NoiseFloor, Part
from quantkit.models.checkpoint import FORMAT, Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Model, Variant
from quantkit.producers.convert import convert
from quantkit.runs.directory import RunDirectory
from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.benchmark.server import Servers
    from quantkit.evaluation.perplexity import Windows
    from quantkit.evaluation.plan import EvaluationPlan
    from quantkit.evaluation.reference import Reference
    from quantkit.runs.stages import Evaluation

T = TypeVar("T")

_IN_LLAMA_CPP = (
    "quantization is measured in llama.cpp, of the weights unpacked to F32 there: what llama.cpp's "
    "own converter made is not turned back into weights for transformers"
)
_OTHER_BATCH = 2
"""How many times as many windows at once show what a batch's size changes."""


@dataclass(frozen=True)
class LossAttribution:
    """Splits losses over the first few ``windows`` of those that ``reference`` was computed on.

    ``text``: its name. ``base``: the source's mean negative log likelihood of each. What each step
    takes: the unquantized GGUF is made once, in the run's cache (on disk as large as the source),
    and removed when it is measured; a GGUF's unpacked weights take as much memory as the source.
    """

    directory: RunDirectory
    source: Checkpoint
    plan: EvaluationPlan
    text: str
    windows: Windows
    reference: Reference
    base: list[float]

    @classmethod
    def of(
        cls, evaluation: Evaluation, source: Checkpoint, measured: Evaluated, count: int | None
    ) -> LossAttribution | None:
        """Cut an evaluation to the first windows of its first text; ``measured``: the source's.

        None where nothing is to be split, or nothing was measured on a text.
        """
        if not count or not measured.texts:
            return None
        name, windows = next(iter(evaluation.plan.texts.items()))
        few = replace(windows, ids=windows.ids[:count])
        return cls(
            evaluation.directory,
            source,
            evaluation.plan,
            name,
            few,
            replace(evaluation.references[name], windows=few),
            measured.texts[name].windows["ppl"][:count],
        )

    def asks_server(self, model: Model) -> bool:
        """Whether the server of the model's engine is asked, which may run for a bench already."""
        return scoring_engine(model).name == scoring_engine(self.source).name

    @property
    def longest(self) -> int:
        """Tokens of a request to such a server: a window, and the one that is always written."""
        return self.windows.context + 1

    def split(self, model: Variant, measured: Evaluated, servers: Servers | None = None) -> Loss:
        """The parts of a variant's loss; ``measured`` is its evaluation on whole texts.

        ``servers``: the model's, where they run for something else as well. What an absent engine
        or an architecture keeps from being measured is left out, and noted.
        """
        from quantkit.evaluation.split import part, parts

        notes: list[str] = []
        whole = measured.texts[self.text].windows
        known = {name: values[: len(self.base)] for name, values in whole.items()}
        engine = serving_engine(model)
        own: dict[str, list[float]] | None
        weights: dict[str, list[float]] | None = None
        served: dict[str, list[float]] | None
        if self.asks_server(model):
            own, plain = known, None
            weights = self._with_exact_inputs(model)
            nll = _unless(notes, "engine", partial(self._likelihoods, model, engine, servers))
            served = None if nll is None else {"ppl": nll}
        else:
            served = known
            plain = _unless(notes, "conversion", lambda: self._unquantized)
            own = _unless(notes, "quantization", partial(self._own, model, notes))
        found = parts(
            self.base,
            own["ppl"] if own else None,
            served["ppl"] if served else None,
            plain.windows["ppl"] if plain else None,
            weights["ppl"] if weights else None,
        )
        of_weights = weights or own
        return Loss(
            conversion=found.get("conversion"),
            quantization=found.get("quantization"),
            activations=found.get("activations"),
            engine=found.get("engine"),
            total=found["total"],
            kld=part(served["kld_mean"]) if served and "kld_mean" in served else None,
            kld_quantization=part(of_weights["kld_mean"]) if of_weights else None,
            windows=len(self.base),
            reference_engine=self.reference.engine,
            serving_engine=config_of(engine) if served else None,
            protocol=self._protocol,
            notes=notes,
        )

    def floor(self, engine: Engine, servers: Servers | None = None) -> NoiseFloor | None:
        """The source on an engine that serves variants; None where that is not installed.

        ``servers``: the source's, where they run for something else as well. Loaded as it is where
        the engine takes it so, else as an unquantized GGUF.
        """
        return _unless([], "noise floor", partial(self._floor, engine, servers))

    def batch_floor(self) -> NoiseFloor:
        """The source in the reference engine once more, more windows at once."""
        from quantkit.engines.transformers import Transformers

        engine = Transformers({"batch": _OTHER_BATCH})
        make = partial(self._measure, self.source, engine)
        key = self._key(engine) | {"batch": _OTHER_BATCH}
        found = self.directory.result("again", self.source, key, make, MeasuredText)
        return self._of_source(engine, found, self._plain, batch=_OTHER_BATCH)

    def _floor(self, engine: Engine, servers: Servers | None) -> NoiseFloor:
        if FORMAT in engine.capabilities.formats:
            nll = self._likelihoods(self.source, engine, servers)
            found = MeasuredText(metrics={}, windows={"ppl": nll})
            return self._of_source(engine, found, self._plain)
        return self._of_source(engine, self._unquantized, str(self._unquantized_spec))

    @property
    def _plain(self) -> str:
        return f"{FORMAT}:{self.source.scheme}"

    def _of_source(
        self, engine: Engine, found: MeasuredText, weights: str, batch: int = 1
    ) -> NoiseFloor:
        from quantkit.evaluation.split import part, parts

        kld, same = found.windows.get("kld_mean"), found.metrics.get("top1_agreement")
        return NoiseFloor(
            engine=config_of(engine),
            batch=batch,
            weights=weights,
            nll=parts(self.base, None, found.windows["ppl"], None)["total"],
            kld=part(kld) if kld else None,
            top1_agreement=Part(value=same.value, stderr=same.stderr) if same else None,
            windows=len(self.base),
            protocol=self._protocol,
        )

    def _likelihoods(self, model: Model, engine: Engine, servers: Servers | None) -> list[float]:
        from quantkit.evaluation.split import window_likelihoods

        engine.check(model)

        def make() -> list[float]:
            running = servers.on(serving(engine, model)).running if servers else None
            return window_likelihoods(model, engine, self.windows, running)

        return self.directory.result("served", model, self._key(engine), make, list[float])

    def _own(self, model: Variant, notes: list[str]) -> dict[str, list[float]]:
        """What the variant's weights lose, whatever runs them: q of ``split``'s equation."""
        converted = model.format == self._unquantized_spec.format
        if converted and self.source.architecture not in architectures.SUPPORTED:
            notes.append(_IN_LLAMA_CPP)
            return self._dequantized(model)
        return self._unpacked(model).windows

    def _with_exact_inputs(self, model: Variant) -> dict[str, list[float]] | None:
        """What the weights alone lose where engines round the inputs of linears, too; else None."""
        from quantkit.engines.transformers import Transformers

        format_ = load_format(model.format)
        if not isinstance(format_, QuantizesInputs) or not format_.quantized_inputs(model):
            return None
        engine = Transformers({"inputs": "exact"})
        make = partial(self._measure, model, engine)
        found = self.directory.result("exact-inputs", model, self._key(engine), make, MeasuredText)
        return found.windows

    def _unpacked(self, model: Variant) -> MeasuredText:
        engine = scoring_engine(self.source)
        weights = load_format(model.format).unpacked(model, self.source)
        make = partial(self._measure, weights, engine)
        return self.directory.result("unpacked", model, self._key(engine), make, MeasuredText)

    def _dequantized(self, model: Variant) -> dict[str, list[float]]:
        """Of a GGUF that cannot be turned back into weights for transformers: its weights as F32 in
        llama.cpp, less what the conversion lost."""
        from quantkit.formats.gguf.gguf_source import GGUFSource

        engine = load_engine("llamacpp")

        def make() -> MeasuredText:
            packed = GGUFSource.of_file(model.weights, allow_requantize=True)
            return self._as_gguf(packed, Spec("gguf", "F32"), engine)

        found = self.directory.result("dequantized", model, self._key(engine), make, MeasuredText)
        converted = np.subtract(self._unquantized.windows["ppl"], self.base)
        return found.windows | {"ppl": np.subtract(found.windows["ppl"], converted).tolist()}

    @property
    def _unquantized_spec(self) -> Spec:
        from quantkit.producers.gguf.checkpoint_content import own_type

        return Spec("gguf", own_type(self.source))

    @cached_property
    def _unquantized(self) -> MeasuredText:
        """The source as a GGUF of its own type, which holds every weight as it is."""
        engine = load_engine("llamacpp")
        spec = self._unquantized_spec
        make = partial(self._as_gguf, self.source, spec, engine)
        key = self._key(engine) | {"spec": str(spec), "quantkit": __version__}
        return self.directory.result("unquantized", self.source, key, make, MeasuredText)

    def _as_gguf(self, source: Checkpoint, spec: Spec, engine: Engine) -> MeasuredText:
        """A GGUF that is made to be measured, and removed."""
        place = self.directory.cache / "unquantized"
        shutil.rmtree(place, ignore_errors=True)  # a killed run's
        try:
            return self._measure(convert(source, spec, None, place), engine)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _measure(self, model: Model, engine: Engine) -> MeasuredText:
        from quantkit.evaluation.text import measure_texts

        engine.check(model)
        texts, references = {self.text: self.windows}, {self.text: self.reference}
        given = (model, engine, texts, references, self.plan.tokenizer, None)
        return measure_texts(*given, anew=True)[self.text]

    @property
    def _protocol(self) -> dict[str, Any]:
        return {
            "text": self.text,
            **self.windows.protocol(),
            "reference_sha256": self.reference.source,
            "metrics_version": METRICS_VERSION,
        }

    def _key(self, engine: Engine) -> dict[str, Any]:
        return {"engine": str(config_of(engine)), "protocol": self._protocol}


def _unless(notes: list[str], name: str, measure: Callable[[], T]) -> T | None:
    """``measure()``, or None if it cannot be measured here: then a note says why."""
    try:
        return measure()
    except (ConversionError, IncompatibleVariant, ToolchainError) as error:
        notes.append(f"{name} not measured: {error}")
        return None
