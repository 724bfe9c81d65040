"""The Python API: what the command line, notebooks and tests call, as ``import quantkit as qk``.

Errors are ``QuantkitError``s of one line. Nothing is printed: what is being done is logged under
the name ``quantkit``, and how far it is goes to what ``show_progress`` was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import RecipeError
from quantkit.models.spec import Spec

if TYPE_CHECKING:
    from quantkit.benchmark.measured import Benched
    from quantkit.benchmark.section import BenchSection
    from quantkit.data.section import CalibrationSection
    from quantkit.evaluation.compare import Compared
    from quantkit.evaluation.section import EvaluateSection
    from quantkit.formats.facts import Facts
    from quantkit.ledger import Ledger
    from quantkit.models.checkpoint import Checkpoint
    from quantkit.models.engine_config import Option
    from quantkit.models.variant import Variant
    from quantkit.recommendation import Recommendation, Wants
    from quantkit.runs.pipeline import RunPlan
    from quantkit.runs.recipe import Recipe


def open(source: str | Path) -> Checkpoint | Variant:
    """A variant's directory, a GGUF file, a packed checkpoint, or the checkpoint of a model: a
    directory, a hub id ``org/name[@revision]`` or ``demo:smollm2-135m``.

    Raise CheckpointError or IncompatibleVariant for what cannot be opened.
    """
    from quantkit.formats.detect import open_model

    return open_model(source)


def inspect(source: str | Path) -> Facts:
    """What a checkpoint, a variant or a GGUF file is: sizes, schemes, origin, oddities."""
    from quantkit.formats.facts import facts

    return facts(open(source))


def verify(path: str | Path) -> list[str]:
    """Every way in which a variant's files differ from its manifest, one line each.

    Raise CheckpointError where there is no manifest.
    """
    from quantkit.formats.detect import open_variant
    from quantkit.models.variant import verify as find_problems

    return find_problems(open_variant(Path(path)))


def recipe(name: str | Path, *overrides: str) -> Recipe:
    """A shipped recipe by its name, or a YAML file; ``overrides``: ``key=value``, such as
    ``source=./my-model``. Raise RecipeError with the line and the key of what is wrong."""
    from quantkit.runs.recipe import load_recipe

    return load_recipe(str(name), overrides)


def plan(recipe: Recipe | str | Path, *overrides: str) -> RunPlan:
    """What a run of this recipe would make, before any long work.

    ``recipe``: what ``recipe`` gives, or its arguments. Raise RecipeError, or what cannot be made.
    """
    from quantkit.runs import pipeline

    return pipeline.plan(_loaded(recipe, overrides))


def run(
    recipe: Recipe | str | Path, *overrides: str, out: str | Path | None = None, force: bool = False
) -> Ledger:
    """Make, measure and compare variants as a recipe says; see ``plan`` for the first arguments.

    ``out``: the run's directory, ``runs/`` and the recipe's name where None; what it has already
    is not done again. ``force``: replace variants that were made otherwise. A variant that fails
    keeps its row in the ledger, with the reason.
    """
    from quantkit.runs import pipeline

    loaded = _loaded(recipe, overrides)
    return pipeline.run(loaded, directory_of(loaded, out), force=force)


def directory_of(recipe: Recipe, out: str | Path | None = None) -> Path:
    """Where a run of this recipe goes."""
    return Path(out) if out is not None else Path("runs") / recipe.name


def convert(
    source: str | Path | Mapping[str, str | Path],
    specs: Sequence[Spec | str],
    out: str | Path,
    *,
    calibration: CalibrationSection | Mapping[str, Any] | None = None,
    force: bool = False,
    allow_requantize: bool = False,
    allow_tokenizer_differences: bool = False,
) -> list[Variant]:
    """Make variants of a model in ``out``, each whole or not at all.

    ``source``: its name, or ``{"base": …, "adapter": …}``: a LoRA that is merged first. ``specs``:
    ``gguf:Q4_K_M``, ``gptq:w4g128``, …; ``calibration``: the keys of a recipe's section.
    A variant that is there already is an error unless ``force``. Raise the first error, after all
    others are made.
    """
    from quantkit.data.section import CalibrationSection
    from quantkit.runs import single
    from quantkit.runs.source import AdaptedSource

    parsed = [Spec.parse(spec) if isinstance(spec, str) else spec for spec in specs]
    given: str | Path | AdaptedSource
    if isinstance(source, Mapping):
        given = AdaptedSource.given({key: str(value) for key, value in source.items()})
    else:
        given = source
    return single.convert(
        given,
        parsed,
        Path(out),
        CalibrationSection.given(calibration),
        force=force,
        allow_requantize=allow_requantize,
        allow_tokenizer_differences=allow_tokenizer_differences,
    )


def evaluate(
    models: Sequence[str | Path],
    reference: str | Path | None = None,
    asked: EvaluateSection | Mapping[str, Any] | None = None,
    *,
    engine_options: Mapping[str, Option] | None = None,
    **keys: Any,
) -> Compared:
    """Measure quality: all models read the same tokens and answer the same questions.

    ``reference``: the source, from which drift is measured. ``asked``, or ``keys``: those of a
    recipe's section ``evaluate``, such as ``texts=["pydoc:evaluation"], windows=8``.
    ``engine_options``: as in ``bench``.
    """
    from quantkit.evaluation.section import EvaluateSection
    from quantkit.runs import single

    section = EvaluateSection.given(asked, **keys)
    return single.evaluate(models, reference, section, engine_options or {})


def bench(
    models: Sequence[str | Path],
    asked: BenchSection | Mapping[str, Any] | None = None,
    *,
    engine_options: Mapping[str, Option] | None = None,
    **keys: Any,
) -> Benched:
    """Measure speed under load, on the real engines.

    ``asked``, or ``keys``: those of a recipe's section ``bench``, such as ``engines=["llamacpp"],
    concurrency=[1, 8]``. ``engine_options``: ``{"vllm.tensor_parallel_size": 2}``; where a single
    engine runs, without its name.
    """
    from quantkit.benchmark.section import BenchSection
    from quantkit.runs import single

    return single.bench(models, BenchSection.given(asked, **keys), engine_options or {})


def recommend(run: Ledger | str | Path, wants: Wants | None = None) -> Recommendation:
    """Which variant of a run to ship, under these limits. ``run``: a ledger, or a run's directory.

    Raise EvaluationError where nothing was served, RecipeError for limits on what was not measured.
    """
    from quantkit.recommendation import recommend as decide

    return decide(_ledger(run), wants)


def profiles(run: Ledger | str | Path, wants: Wants | None = None) -> list[Recommendation]:
    """What ``recommend`` says for a laptop, for a server, and where quality comes first."""
    from quantkit.recommendation import profiles as decide

    return decide(_ledger(run), wants)


def report(run: str | Path) -> Path:
    """Write a run's ``report.html`` and ``report.md`` again from its ledger; the first's path."""
    from quantkit import reports

    return reports.write(_ledger(run), Path(run))


def serve(models: Sequence[str | Path] = (), **settings: Any) -> int:
    """Serve models behind one OpenAI-compatible API until SIGINT or SIGTERM; the exit code.

    ``settings``: the fields of ``quantkit.gateway.command.ServeCommand``, such as ``port=8001``,
    ``from_run="runs/mine"`` or ``engine="llamacpp"``.
    """
    from quantkit.gateway.command import ServeCommand
    from quantkit.gateway.command import run as run_gateway

    for name in ("config", "from_run"):
        if settings.get(name) is not None:
            settings[name] = Path(settings[name])
    return run_gateway(ServeCommand([str(model) for model in models], **settings))


def _loaded(given: Recipe | str | Path, overrides: Sequence[str]) -> Recipe:
    if isinstance(given, str | Path):
        return recipe(given, *overrides)
    if overrides:
        raise RecipeError("overrides are for recipes in files: change the Recipe itself")
    return given


def _ledger(run: Ledger | str | Path) -> Ledger:
    from quantkit.ledger import Ledger

    return run if isinstance(run, Ledger) else Ledger.of_run(Path(run))
