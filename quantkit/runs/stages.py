"""The stages of a run, each bound to its section of the recipe and to the run's directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from quantkit.benchmark.section import BenchSection
from quantkit.data.calibration import Calibration, calibrate, stream
from quantkit.data.mix import Mix, judges, load_calibration
from quantkit.data.text import Text
from quantkit.data.texts import check_disjoint, load_texts
from quantkit.engines import load_engine
from quantkit.engines.base import config_of
from quantkit.errors import RecipeError
from quantkit.evaluation.prompt_file import load_prompts
from quantkit.evaluation.samples import KEPT_VERSION, METRICS_VERSION, Evaluated
from quantkit.evaluation.section import EvaluateSection
from quantkit.formats import format_of
from quantkit.ledger import TextEntry
from quantkit.ledger.load import MemoryBandwidth
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.tokenizer import load_tokenizer
from quantkit.models.variant import Model, tokenizer_directory
from quantkit.runs.directory import RunDirectory
from quantkit.runs.environment import environment
from quantkit.runs.recipe import Recipe

if TYPE_CHECKING:
    from quantkit.benchmark.generator import Client
    from quantkit.benchmark.measured import BenchResult
    from quantkit.benchmark.options import BenchOptions
    from quantkit.benchmark.server import Servers
    from quantkit.engines.base import ServingEngine
    from quantkit.evaluation.early_stop import EarlyStop, Keep
    from quantkit.evaluation.plan import EvaluationPlan
    from quantkit.evaluation.prompt_file import Prompts
    from quantkit.evaluation.prompt_reference import ReferenceAnswers
    from quantkit.evaluation.reference import Reference


@dataclass(frozen=True)
class Texts:
    """What a run calibrates and evaluates on; checked to have no paragraph in common."""

    calibration: Calibration | None
    evaluation: dict[str, Text]
    """The texts, by name."""
    prompts: Prompts | None

    @classmethod
    def load(cls, recipe: Recipe, source: Checkpoint, *, needs_calibration: bool) -> Texts:
        """Raise RecipeError where a text is missing, too short, or shared by both, or a prompt
        cannot be read."""
        section = recipe.evaluate
        evaluation = load_texts(section.texts) if section else {}
        prompts = load_prompts(section.prompts, section.answer_tokens, source) if section else None
        if not needs_calibration:
            return cls(None, evaluation, prompts)
        text = load_calibration(recipe.calibration.text)
        for part in text.texts if isinstance(text, Mix) else (text,):
            for one in evaluation.values():
                check_disjoint(part, one)
        windows = recipe.calibration.windows()
        calibration = calibrate(text, source.tokenizer, judges=judges(text), **windows)
        return cls(calibration, evaluation, prompts)


@dataclass(frozen=True)
class Evaluation:
    """Measures any model of the run on the same tokens and questions."""

    directory: RunDirectory
    plan: EvaluationPlan
    references: dict[str, Reference]
    answers: ReferenceAnswers | None
    early_stop: EarlyStop | None
    texts: list[TextEntry]

    @classmethod
    def prepare(
        cls,
        section: EvaluateSection,
        source: Checkpoint,
        texts: Texts,
        run: RunDirectory,
        variants: int,
    ) -> Evaluation:
        """Tokenize the texts and let the source compute its distributions on them, once; the same
        for its answers to the prompts. ``variants``: how many will be measured."""
        from quantkit.evaluation.prompt_reference import ReferenceAnswers
        from quantkit.evaluation.reference import Reference

        prompts = texts.prompts
        plan = evaluation_plan(section, source, texts.evaluation, prompts)
        answers = ReferenceAnswers.build(source, prompts, run.cache) if prompts else None
        stop = early_stop(section, source, plan, variants, partial(run.result, "questions"))
        entries = [
            TextEntry(
                name=name,
                dataset=text.dataset,
                revision=text.revision,
                tokens=len(plan.texts[name].ids) * plan.texts[name].context,
                sha256=plan.texts[name].sha256,
            )
            for name, text in texts.evaluation.items()
        ]
        references = Reference.of_texts(source, plan.texts, run.cache)
        return cls(run, plan, references, answers, stop, entries)

    def measure(self, model: Model) -> Evaluated:
        """All that is known of one model, measured now or found from before."""
        from quantkit.evaluation.evaluate import evaluate

        engine = self.plan.engine_of(model)
        key = {
            "metrics_version": METRICS_VERSION,
            "kept_version": KEPT_VERSION,
            "engine": str(config_of(engine)),
            "texts": {name: windows.protocol() for name, windows in self.plan.texts.items()},
            "reference": [reference.source for reference in self.references.values()],
            "prompts": _prompts_key(self.answers) if self.answers else None,
            "tasks": self.plan.tasks,
            "shots": self.plan.shots,
            "limit": self.plan.limit,
            "chat": self.plan.chat,
            "data": self.plan.files,
            "early_stop": self.early_stop.key(model) if self.early_stop else None,
        }
        details, stop = self.directory.details(model), self.early_stop
        make = partial(evaluate, model, self.references, self.plan, details, self.answers, stop)
        found = self.directory.result("evaluate", model, key, make, Evaluated)
        if stop:
            stop.note(found)
        return found


@dataclass(frozen=True)
class Benching:
    """Puts any model of the run under the same loads, on every engine of the recipe's that takes
    it. Each repetition is kept as soon as it was measured."""

    directory: RunDirectory
    section: BenchSection
    options: BenchOptions
    client: Client
    bandwidth: MemoryBandwidth | None
    """The machine's memory bandwidth; None where engines may run on a GPU."""

    @classmethod
    @contextmanager
    def prepared(
        cls, section: BenchSection, source: Checkpoint, run: RunDirectory
    ) -> Iterator[Benching]:
        """Read the prompts, and measure the machine's memory where that was not done yet; the load
        generator, once started, runs as long as the block does."""
        from quantkit.benchmark.generator import Client
        from quantkit.benchmark.memory_speed import memory_bandwidth
        from quantkit.benchmark.options import BenchOptions, workload

        prompts = load_prompts(section.prompts, section.lengths[1], source)
        options = BenchOptions.of_section(section, workload(section, source, prompts))
        machine = environment()
        bandwidth = None
        if machine.gpu is None:
            key = machine.model_dump(mode="json", exclude={"tools", "memory_bandwidth"})
            bandwidth = run.kept("memory-bandwidth", key, memory_bandwidth, MemoryBandwidth)
        with Client(run.logs / "guidellm") as client:
            yield cls(run, section, options, client, bandwidth)

    def servers(self, model: Model, longest: int | None = None) -> Servers:
        """The model's servers; ``longest``: tokens of a request that is none of the load's."""
        from quantkit.benchmark.server import Servers

        return Servers(model, self.options, self.directory.logs, self.client, longest)

    def measure(self, servers: Servers) -> BenchResult:
        """What the model of these servers delivered, measured now or found from before.

        After an error the result has what was measured and the error; the next engine follows.
        """
        from quantkit.benchmark import engines_of, on_each

        engines = engines_of(self.section.engines, servers.model)
        return on_each(engines, partial(self._measure, servers))

    def _measure(self, servers: Servers, engine: ServingEngine) -> BenchResult:
        from quantkit.benchmark import bench
        from quantkit.benchmark.measured import BenchResult

        key = {
            "engine": str(config_of(engine)),
            "options": self.options.key(),
            "bandwidth": self.bandwidth.model_dump() if self.bandwidth else None,
        }
        keep = partial(self.directory.result, model=servers.model)
        make = partial(bench, servers, engine, self.bandwidth, keep)
        return self.directory.result("bench", servers.model, key, make, BenchResult)


def evaluated_as_served(recipe: Recipe) -> EvaluateSection | None:
    """The recipe's ``evaluate``, on the first engine of its load that gives full logits where it
    names none: what is served is what was measured."""
    section, engines = recipe.evaluate, recipe.bench.engines if recipe.bench else []
    if section is None or section.engine is not None:
        return section
    able = (one for one in engines if load_engine(one).capabilities.logits == "full")
    return section.model_copy(update={"engine": next(able, None)})


def check_measuring_engine(recipe: Recipe, source: Checkpoint) -> None:
    """Raise RecipeError where the engine that ``evaluate`` names takes none of the formats or gives
    no logits for what needs them, ToolchainError where it is not installed."""
    section = recipe.evaluate
    if section is None or section.engine is None:
        return
    engine = load_engine(section.engine)
    if engine.capabilities.logits != "full" and (section.texts or section.prompts):
        raise RecipeError(
            f"evaluate.engine: {engine.name} gives no logits of the whole vocabulary, which "
            "evaluate.texts and evaluate.prompts need; leave both out (texts: []), or the engine"
        )
    takes = engine.capabilities.formats
    formats = {source.format, *(spec.format for spec in recipe.specs)}
    if len(recipe.specs) < len(recipe.variants):
        formats |= takes  # what others made is known when it is opened
    if not formats & takes:
        raise RecipeError(
            f"evaluate.engine: {engine.name} takes {', '.join(sorted(takes))}, and there is only "
            f"{', '.join(sorted(formats))}"
        )
    if source.format in takes:
        engine.check(source)


def evaluation_plan(
    section: EvaluateSection,
    model: Model,
    texts: Mapping[str, Text],
    prompts: Prompts | None = None,
) -> EvaluationPlan:
    """What is asked of every model alike, in the tokens of ``model``.

    Raise EvaluationError where a text is too short, CheckpointError where ``model`` brings no
    tokenizer (a bare GGUF file).
    """
    from quantkit.evaluation.perplexity import windows
    from quantkit.evaluation.plan import EvaluationPlan

    tokenizer = load_tokenizer(tokenizer_directory(model))
    cut = {}
    for name, text in texts.items():
        ids, bos = stream(tokenizer, text.text)  # as llama-perplexity cuts it
        cut[name] = windows(ids, section.context, bos, section.windows, name)
    return EvaluationPlan(
        tokenizer=tokenizer,
        max_length=format_of(model).context_length(model),
        texts=cut,
        prompts=prompts,
        tasks=tuple(section.tasks),
        shots=section.shots,
        limit=section.limit,
        chat=section.chat,
        data=section.data,
        engine=section.engine,
    )


def early_stop(
    section: EvaluateSection,
    source: Checkpoint,
    plan: EvaluationPlan,
    variants: int,
    keep: Keep | None = None,
) -> EarlyStop | None:
    """Decides when enough questions were asked; None where all are to be asked."""
    if section.until is None or not section.tasks:
        return None
    from quantkit.evaluation.early_stop import EarlyStop

    return EarlyStop(source, plan, section.tolerance, variants, keep)


def _prompts_key(answers: ReferenceAnswers) -> list[Any]:
    """What a result on the prompts depends on, and what it says of them."""
    return [answers.source, answers.prompts.protocol(), answers.prompts.content_sha256]
