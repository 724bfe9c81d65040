"""One stage of a run by itself, for models that are named, not made by a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

from quantkit.data.mix import judges, load_calibration
from quantkit.data.section import CalibrationSection
from quantkit.engines import load_engine
from quantkit.engines.base import ServingEngine
from quantkit.errors import RecipeError
from quantkit.evaluation.section import EvaluateSection
from quantkit.evaluation.tokenizer_match import require_same_tokens
from quantkit.formats.decoded import open_decoded
from quantkit.formats.detect import open_model
from quantkit.formats.merged import Merged
from quantkit.ledger import REFERENCE
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.engine_config import EngineConfig, Option, by_engine
from quantkit.models.spec import Spec
from quantkit.models.variant import Model, Variant
from quantkit.runs.source import Source, open_given
from quantkit.system import extras
from quantkit.system.garbage import keeping_all
from quantkit.system.home import home
from quantkit.system.machine import gpu
from quantkit.system.progress import say

if TYPE_CHECKING:
    from quantkit.benchmark.measured import Benched
    from quantkit.benchmark.section import BenchSection
    from quantkit.evaluation.compare import Compared
    from quantkit.producers.base import Plan


def convert(
    source: Source,
    specs: Sequence[Spec],
    out: Path,
    calibration: CalibrationSection,
    *,
    force: bool,
    allow_requantize: bool,
    allow_tokenizer_differences: bool,
) -> list[Variant]:
    """Make each spec of the source in ``out``; all are planned before the first is made.

    Raise the first error, after all others are made.
    """
    from quantkit.data.calibration import calibrate
    from quantkit.producers.convert import convert_many
    from quantkit.producers.merge import lent

    checkpoint, plans = _planned(source, specs, allow_requantize, allow_tokenizer_differences)
    for spec in specs:
        if (out / spec.directory).exists() and not force:
            raise RecipeError(
                f"{out / spec.directory}: exists already; choose another --out or pass --force"
            )
    windows = None
    if any(planned.needs_calibration for planned in plans):
        text = load_calibration(calibration.text)
        given = calibration.windows()
        windows = calibrate(text, checkpoint.tokenizer, judges=judges(text), **given)
    with (
        lent(checkpoint, out)
        if isinstance(checkpoint, Merged)
        else nullcontext(checkpoint) as whole
    ):
        made = convert_many(
            whole,
            specs,
            windows,
            out,
            force=force,
            allow_tokenizer_differences=allow_tokenizer_differences,
        )
    failed = [error for error in made.values() if isinstance(error, Exception)]
    if failed:
        for error in failed[1:]:
            say(f"quantkit: {error}")
        raise failed[0]
    return [variant for variant in made.values() if isinstance(variant, Variant)]


@keeping_all()
def _planned(
    source: Source,
    specs: Sequence[Spec],
    allow_requantize: bool,
    allow_tokenizer_differences: bool,
) -> tuple[Checkpoint, list[Plan]]:
    from quantkit.producers.convert import plan

    checkpoint = open_given(source, gguf=True, allow_requantize=allow_requantize)
    allow = allow_tokenizer_differences
    return checkpoint, [plan(checkpoint, spec, allow_tokenizer_differences=allow) for spec in specs]


def evaluate(
    paths: Sequence[str | Path],
    reference: str | Path | None,
    section: EvaluateSection,
    options: Mapping[str, Option],
) -> Compared:
    """Measure the reference and each path on the same ids, and compare each with each.

    ``options``: of the engines that measure, as ``by_engine`` takes them.
    """
    from quantkit.data.texts import load_texts
    from quantkit.evaluation.compare import Compared, compare
    from quantkit.evaluation.evaluate import evaluate as measure
    from quantkit.evaluation.prompt_file import load_prompts
    from quantkit.evaluation.prompt_reference import ReferenceAnswers
    from quantkit.evaluation.reference import Reference
    from quantkit.runs.stages import early_stop, evaluation_plan

    if not section.texts and section.prompts is None and not section.tasks:
        raise RecipeError("nothing to evaluate: give --text, --eval or --prompts, or several")
    if section.prompts is not None and reference is None:
        raise RecipeError("--prompts compares with the source's answers: give --reference MODEL")
    if section.until and (reference is None or not section.tasks):
        raise RecipeError("--until decided: a verdict needs questions and --reference MODEL")
    models = named(paths)
    source = open_decoded(reference) if reference else None
    if source:
        models = {name: model for name, model in models.items() if model.path != source.path}
    first = source or next(iter(models.values()))
    own = load_prompts(section.prompts, section.answer_tokens, first)
    plan = evaluation_plan(section, first, load_texts(section.texts), own)
    running = plan.engine_names([*models.values(), *([source] if source else [])])
    plan = replace(plan, engine_options=by_engine(options, running))
    for model in models.values():
        require_same_tokens(first, model)
        if section.engine is not None:
            load_engine(section.engine).check(model)
        plan.engine_of(model)
    if source:
        plan.engine_of(source)
    with TemporaryDirectory(prefix="quantkit-") as cache:
        known = Reference.of_texts(source, plan.texts) if source else {}
        answers = ReferenceAnswers.build(source, own, Path(cache)) if source and own else None
        stop = early_stop(section, source, plan, len(models)) if source else None
        found = {}
        for name, model in models.items():
            found[name] = measure(model, known, plan, answers=answers, early_stop=stop)
            if stop:
                stop.note(found[name])
        if source:
            own_metrics = measure(source, known, plan, answers=answers, early_stop=stop)
            found = {REFERENCE: own_metrics, **found}
        return Compared(found, compare(found, section.tolerance))


def bench(
    paths: Sequence[str | Path], section: BenchSection, options: Mapping[str, Option]
) -> Benched:
    """Put each model under the same loads, on each engine that is asked for and takes it.

    ``options``: of the engines, as ``by_engine`` takes them. After an error a model's result has
    what was measured and the error, and the next model follows.
    """
    from quantkit.benchmark import bench as measure
    from quantkit.benchmark import engines_of, on_each
    from quantkit.benchmark.generator import Client
    from quantkit.benchmark.measured import Benched
    from quantkit.benchmark.memory_speed import memory_bandwidth
    from quantkit.benchmark.options import BenchOptions, workload
    from quantkit.benchmark.server import Servers
    from quantkit.evaluation.prompt_file import load_prompts

    extras.require("bench")
    models = named(paths)
    asked = {name: engines_of(section.engines, model) for name, model in models.items()}
    running = [engine.name for each in asked.values() for engine in each]
    given = by_engine(options, running)
    engines = {
        name: [_having(engine, given[engine.name]) for engine in each]
        for name, each in asked.items()
    }
    loads = {}
    for name, model in models.items():
        for engine in engines[name]:
            engine.check(model)
        prompts = load_prompts(section.prompts, section.lengths[1], model)
        loads[name] = BenchOptions.of_section(section, workload(section, model, prompts))
    bandwidth = None if gpu() else memory_bandwidth()
    work = home() / "logs" / "bench"
    results = Benched()
    work.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(prefix="guidellm-", dir=work) as files,  # several may run
        Client(Path(files)) as client,
    ):
        for name, model in models.items():
            with Servers(model, loads[name], work, client) as servers:
                results[name] = on_each(
                    engines[name], partial(measure, servers, bandwidth=bandwidth)
                )
    for name, result in results.items():
        if sample := result.sample:
            say(f"{name}: {sample.prompt!r} → {sample.completion!r}")
    return results


def _having(engine: ServingEngine, options: Mapping[str, Option]) -> ServingEngine:
    config = EngineConfig(name=engine.name, options=dict(engine.options))
    return cast("ServingEngine", load_engine(config.having(options)))


def named(paths: Sequence[str | Path]) -> dict[str, Model]:
    """Open all before the first long work; by id, or by path where ids repeat."""
    models = [(str(path), open_model(path)) for path in paths]
    ids = [model.id for _, model in models]
    return {path if ids.count(model.id) > 1 else model.id: model for path, model in models}
