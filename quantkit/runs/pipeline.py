"""A whole run on one screen: the file to read first."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from quantkit import reports as report
from quantkit.engines import scoring_engine, serving_engine
from quantkit.errors import QuantkitError, RecipeError
from quantkit.ledger import LEDGER, Ledger, SourceEntry
from quantkit.models.checkpoint import Checkpoint
from quantkit.producers.base import Plan
from quantkit.producers.convert import plan as plan_variant
from quantkit.producers.convert import require_space
from quantkit.runs.course import run_course
from quantkit.runs.directory import open_run
from quantkit.runs.environment import environment
from quantkit.runs.external import ExternalVariant
from quantkit.runs.recipe import Recipe
from quantkit.runs.source import open_given
from quantkit.runs.stages import Texts, check_measuring_engine
from quantkit.runs.steps import Work
from quantkit.system import extras
from quantkit.system.garbage import keeping_all
from quantkit.system.progress import say
from quantkit.system.table import Table, Tabular


@dataclass(frozen=True, repr=False)
class RunPlan(Tabular):
    """What a run will do, known before any long work."""

    source: Checkpoint
    variants: list[Plan]
    brought: list[ExternalVariant]
    unusable: dict[str, str]
    """Why external variants cannot be measured, by their ids."""

    @property
    def bytes(self) -> int:
        """Disk that the variants will take."""
        return sum(variant.bytes for variant in self.variants)

    def table(self) -> Table:
        """One row a variant that is to be made."""
        return Table.of_records(
            [
                {
                    "variant": one.spec.directory,
                    "spec": str(one.spec),
                    "bytes": one.bytes,
                    "bits_per_weight": one.bits_per_weight,
                    "needs_calibration": "yes" if one.needs_calibration else "no",
                    "notes": "; ".join(one.notes),
                }
                for one in self.variants
            ]
        )


@keeping_all()
def plan(recipe: Recipe) -> RunPlan:
    """Open the source and refuse what cannot be made of it: reads no tensor data."""
    source = open_given(recipe.source)
    brought = [entry for entry in recipe.variants if isinstance(entry, ExternalVariant)]
    unusable = {}
    for entry in brought:
        try:
            entry.check(source)
        except RecipeError:  # of the entry itself
            raise
        except QuantkitError as error:
            unusable[entry.directory] = str(error)
    if recipe.evaluate:
        scoring_engine(source).check(source)
    allow = recipe.allow_tokenizer_differences
    plans = [plan_variant(source, spec, allow_tokenizer_differences=allow) for spec in recipe.specs]
    return RunPlan(source, plans, brought, unusable)


def run(recipe: Recipe, out: Path, *, force: bool = False) -> Ledger:
    """Make and measure all that the recipe asks for; what ``out`` has already is not done again.

    Writes ``ledger.json``, ``report.html`` and ``report.md`` into ``out``; the report is there from
    the start, and grows. A variant that fails keeps its row, with the reason, and the others go on.
    """
    started = time.monotonic()
    planned = plan(recipe)
    source = planned.source
    for name, problem in planned.unusable.items():
        say(f"{name}: will have no results: {problem}")
    _check_engines(recipe, source)
    texts = Texts.load(
        recipe, source, needs_calibration=any(p.needs_calibration for p in planned.variants)
    )
    with open_run(out) as directory, ExitStack() as stack:
        require_space(directory.path, planned.bytes, f"recipe {recipe.name}")
        source = directory.source(source, force=force)
        work = Work(recipe, source, planned.variants, texts, directory, stack, force=force)
        machine = environment()

        def so_far() -> Ledger:
            evaluation, benching = work.evaluation, work.benching
            return Ledger(
                name=recipe.name,
                seconds=time.monotonic() - started,
                source=SourceEntry.of(source),
                environment=machine.model_copy(
                    update={"memory_bandwidth": benching.bandwidth if benching else None}
                ),
                recipe=recipe.model_dump(mode="json"),
                calibration=texts.calibration.record if texts.calibration else None,
                texts=evaluation.texts if evaluation else [],
                variants=[row.row(source) for row in work.rows],
                comparisons=work.comparisons,
                noise_floor=work.noise_floor,
            )

        say(f"report: {directory.path / report.PAGE}; it grows while the run goes on")
        run_course(
            work.steps(), lambda underway: report.write_page(so_far(), directory.path, underway)
        )
        ledger = so_far()
        ledger.write(directory.path / LEDGER)
        report.write(ledger, directory.path)
    return ledger


def _check_engines(recipe: Recipe, source: Checkpoint) -> None:
    """Raise ToolchainError for an engine or an extra that the run will need and that is not
    installed, RecipeError for an engine that cannot measure what it should."""
    check_measuring_engine(recipe, source)
    if recipe.evaluate and recipe.evaluate.tasks:
        extras.require("eval")
    if recipe.bench:
        extras.require("bench")
        serving_engine(source).check(source)
