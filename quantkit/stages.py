"""The stages of a run, each bound to its section of the recipe and to the run's directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from quantkit.calibration import Calibration, calibrate, tokenize
from quantkit.checkpoint import Checkpoint, load_tokenizer
from quantkit.engines import scoring_engine, serving_engine
from quantkit.evaluate.samples import METRICS_VERSION, Evaluated
from quantkit.formats import load_format
from quantkit.ledger import TextEntry
from quantkit.recipe import BenchSection, EvaluateSection, Recipe
from quantkit.run import RunDirectory
from quantkit.texts import Text, check_disjoint, load_text
from quantkit.variant import Model, tokenizer_directory

if TYPE_CHECKING:
    from quantkit.bench import BenchResult
    from quantkit.evaluate import EvaluationPlan
    from quantkit.evaluate.reference import Reference


@dataclass(frozen=True)
class Texts:
    """What a run calibrates and evaluates on; checked to have no paragraph in common."""

    calibration: Calibration | None
    evaluation: Text | None

    @classmethod
    def load(cls, recipe: Recipe, source: Checkpoint, *, needs_calibration: bool) -> Texts:
        """Raise RecipeError where a text is missing, too short, or shared by both."""
        section = recipe.evaluate
        evaluation = load_text(section.text) if section and section.text else None
        if not needs_calibration:
            return cls(None, evaluation)
        text = load_text(recipe.calibration.text)
        if evaluation is not None:
            check_disjoint(text, evaluation)
        return cls(calibrate(text, source.tokenizer, **recipe.calibration.windows()), evaluation)


@dataclass(frozen=True)
class Evaluation:
    """Measures any model of the run on the same tokens and questions."""

    directory: RunDirectory
    plan: EvaluationPlan
    reference: Reference | None
    text: TextEntry | None

    @classmethod
    def prepare(
        cls, section: EvaluateSection, source: Checkpoint, text: Text | None, run: RunDirectory
    ) -> Evaluation:
        """Tokenize the text and let the source compute its distributions on it, once."""
        from quantkit.evaluate.reference import Reference

        plan = evaluation_plan(section, source, text)
        if text is None or plan.windows is None:
            return cls(run, plan, None, None)
        entry = TextEntry(
            dataset=text.dataset,
            revision=text.revision,
            tokens=len(plan.windows.ids) * plan.windows.context,
            sha256=plan.windows.sha256,
        )
        return cls(run, plan, Reference.build(source, plan.windows, run.cache), entry)

    def measure(self, model: Model) -> Evaluated:
        """All that is known of one model, measured now or found from before."""
        from quantkit.evaluate import evaluate

        engine = scoring_engine(model)
        key = {
            "metrics_version": METRICS_VERSION,
            "engine": [engine.name, engine.version()],
            "windows": self.plan.windows.protocol() if self.plan.windows else None,
            "reference": self.reference.source if self.reference else None,
            "tasks": self.plan.tasks,
            "shots": self.plan.shots,
            "limit": self.plan.limit,
            "metadata": dict(self.plan.metadata),
        }
        make = partial(evaluate, model, self.reference, self.plan, self.directory.details(model))
        return self.directory.result("evaluate", model, key, make, Evaluated)


@dataclass(frozen=True)
class Benching:
    """Puts any model of the run under the same load, on the engine that serves it."""

    directory: RunDirectory
    section: BenchSection

    def measure(self, model: Model) -> BenchResult:
        """What the model delivered, measured now or found from before."""
        from quantkit.bench import BenchOptions, BenchResult, bench

        options = BenchOptions(
            **{**self.section.model_dump(), "concurrency": tuple(self.section.concurrency)}
        )
        engine = serving_engine(model)
        key = {"engine": [engine.name, engine.version()], "options": asdict(options)}
        make = partial(bench, model, options, self.directory.logs)
        return self.directory.result("bench", model, key, make, BenchResult)


def evaluation_plan(section: EvaluateSection, model: Model, text: Text | None) -> EvaluationPlan:
    """What is asked of every model alike, in the tokens of ``model``.

    Raise EvaluationError where the text is too short, CheckpointError where ``model`` brings no
    tokenizer (a bare GGUF file).
    """
    from quantkit.evaluate import EvaluationPlan
    from quantkit.evaluate.perplexity import bos_id, windows

    tokenizer = load_tokenizer(tokenizer_directory(model))
    cut = None
    if text is not None:
        bos = bos_id(tokenizer)
        # The text as a model with a BOS reads it, which is how llama-perplexity cuts it.
        ids = [*([] if bos is None else [bos]), *tokenize(tokenizer, text.text)]
        cut = windows(ids, section.context, bos, section.windows)
    return EvaluationPlan(
        tokenizer=tokenizer,
        max_length=_context_length(model),
        windows=cut,
        tasks=tuple(section.tasks),
        shots=section.shots,
        limit=section.limit,
        metadata={"mmlu_directory": section.mmlu_directory} if section.mmlu_directory else {},
    )


def _context_length(model: Model) -> int:
    """The most tokens that the model was made for."""
    if isinstance(model, Checkpoint):
        return int(model.config["max_position_embeddings"])
    return int(load_format(model.format).inspect(model)["context_length"])
