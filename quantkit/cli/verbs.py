"""What the verbs of the command line do outside of a run, as functions."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quantkit.cli.spec_arguments import by_producer, with_gguf_options, with_integer_options
from quantkit.data.section import CalibrationSection
from quantkit.engines import load_engine
from quantkit.errors import RecipeError
from quantkit.evaluation.section import EvaluateSection
from quantkit.evaluation.tokenizer_match import require_same_tokens
from quantkit.formats.detect import open_model, open_variant
from quantkit.formats.gguf.model_file import gguf_at
from quantkit.ledger import REFERENCE
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.gguf_files import SUFFIX
from quantkit.models.spec import Spec
from quantkit.models.variant import MANIFEST, Model, Variant
from quantkit.system.garbage import keeping_all
from quantkit.system.progress import say

if TYPE_CHECKING:
    from quantkit.benchmark.measured import BenchResult
    from quantkit.evaluation.compare import Compared
    from quantkit.producers.base import Plan


def convert(
    model: str,
    specs: Sequence[str],
    out: Path,
    *,
    force: bool,
    calibration: Mapping[str, Any],
    producer: Mapping[str, Any],
    integers: Mapping[str, Any],
    gguf: Mapping[str, Any],
    allow_requantize: bool = False,
    allow_tokenizer_differences: bool = False,
) -> list[Variant]:
    """Make each spec of the model in ``out``; all are planned before the first is made.

    ``calibration`` holds the keys of a recipe's section, ``gguf`` options of all GGUF specs, None
    where not given, ``producer`` who makes the others, ``integers`` what the native ones are told.
    Raise the first error, after all others are made.
    """
    from quantkit.data.calibration import calibrate
    from quantkit.data.mix import judges, load_calibration
    from quantkit.producers.convert import convert_many

    parsed = [Spec.parse(spec) for spec in dict.fromkeys(specs)]
    parsed = with_integer_options(with_gguf_options(parsed, gguf), integers)
    parsed = by_producer(parsed, **producer)
    source, plans = _planned(model, parsed, allow_requantize, allow_tokenizer_differences)
    for spec in parsed:
        if (out / spec.directory).exists() and not force:
            raise RecipeError(
                f"{out / spec.directory}: exists already; choose another --out or pass --force"
            )
    windows = None
    if any(planned.needs_calibration for planned in plans):
        section = CalibrationSection(**calibration)
        text = load_calibration(section.text)
        windows = calibrate(text, source.tokenizer, judges=judges(text), **section.windows())
    made = convert_many(
        source,
        parsed,
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
    model: str,
    specs: Sequence[Spec],
    allow_requantize: bool,
    allow_tokenizer_differences: bool,
) -> tuple[Checkpoint, list[Plan]]:
    from quantkit.producers.convert import plan

    source = _open_source(model, allow_requantize)
    threading.Thread(target=_hash, args=(source,), daemon=True).start()
    allow = allow_tokenizer_differences
    return source, [plan(source, spec, allow_tokenizer_differences=allow) for spec in specs]


def _hash(source: Checkpoint) -> None:
    """The manifests need the digests in the end; meanwhile the conversion is planned."""
    with contextlib.suppress(OSError):  # which is raised again where they are needed
        _ = source.sha256


def _open_source(model: str, allow_requantize: bool) -> Checkpoint:
    """A checkpoint, or a GGUF file or variant in its place."""
    path = Path(model).expanduser()
    if path.suffix.lower() == SUFFIX or (path / MANIFEST).is_file() or gguf_at(path):
        variant = open_variant(path)
        if variant.format == "gguf":
            from quantkit.formats.gguf.gguf_source import GGUFSource

            return GGUFSource.of_file(variant.weights, allow_requantize=allow_requantize)
    return Checkpoint.open(model)


def evaluate(
    paths: Sequence[str],
    reference: str | None,
    *,
    tasks: tuple[str, ...],
    texts: tuple[str, ...],
    context: int,
    windows: int | None,
    shots: int | None,
    limit: int | None,
    verdicts: Mapping[str, Any],
    chat: bool,
    data: tuple[str, ...],
    engine: str | None,
    prompts: str | None,
    answer_tokens: int,
) -> Compared:
    """Measure the reference and each path on the same ids, and compare each with each.

    ``verdicts``: ``tolerance`` and ``until`` of a recipe's section.
    """
    from quantkit.data.texts import load_texts
    from quantkit.evaluation.compare import Compared, compare
    from quantkit.evaluation.evaluate import evaluate as measure
    from quantkit.evaluation.prompt_file import load_prompts
    from quantkit.evaluation.prompt_reference import ReferenceAnswers
    from quantkit.evaluation.reference import Reference
    from quantkit.runs.stages import early_stop, evaluation_plan

    if not texts and prompts is None and not tasks:
        raise RecipeError("nothing to evaluate: give --text, --eval or --prompts, or several")
    if prompts is not None and reference is None:
        raise RecipeError("--prompts compares with the source's answers: give --reference MODEL")
    if verdicts["until"] and (reference is None or not tasks):
        raise RecipeError("--until decided: a verdict needs questions and --reference MODEL")
    section = EvaluateSection(
        texts=list(texts),
        context=context,
        windows=windows,
        tasks=list(tasks),
        shots=shots,
        limit=limit,
        **verdicts,
        chat=chat,
        data=_data(data),
        prompts=prompts,
        answer_tokens=answer_tokens,
        engine=engine,
    )
    models = _named(paths)
    source = Checkpoint.open(reference) if reference else None
    if source:
        models = {name: model for name, model in models.items() if model.path != source.path}
    first = source or next(iter(models.values()))
    own = load_prompts(prompts, answer_tokens, first)
    plan = evaluation_plan(section, first, load_texts(texts), own)
    for model in models.values():
        require_same_tokens(first, model)
        if engine is not None:
            load_engine(engine).check(model)
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


def _data(pairs: Sequence[str]) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    for task, path in found.items():
        if not task or not path:
            raise RecipeError(f"--eval-data {task or path}: expected TASK=PATH, as mmlu_csv=./mmlu")
    return found


def bench(paths: Sequence[str], **options: Any) -> dict[str, BenchResult]:
    """Put each path under the same loads; ``options`` are those of ``section``."""
    from quantkit.benchmark.command import run, section

    return run(_named(paths), section(**options))


def serve(paths: Sequence[str], **options: Any) -> int:
    """Serve until Ctrl-C; returns the exit code. ``options`` are those of ``ServeCommand``."""
    from quantkit.gateway.command import ServeCommand, run

    return run(ServeCommand(paths, **options))


def inspect(path: str) -> dict[str, Any]:
    """Facts about a checkpoint, a variant or a bare GGUF file, as JSON values."""
    from quantkit.formats import load_format

    model = open_model(path)
    if isinstance(model, Checkpoint):
        return {
            "kind": "checkpoint",
            "architecture": model.architecture,
            "dtype": model.scheme,
            "parameters": model.parameters,
            "tensors": len(model.tensors),
            "bytes": model.bytes,
            "context_length": model.config.get("max_position_embeddings"),
            "shards": len({info.shard for info in model.tensors.values()}),
            "origin": model.origin,
            "notes": list(model.notes),
        }
    facts: dict[str, Any] = {
        "kind": "variant" if model.manifest else "weights without a manifest",
        "format": model.format,
        "scheme": model.scheme,
        **load_format(model.format).inspect(model),
    }
    if model.manifest:
        told = [line for record in model.manifest.proof.values() for line in record.differences]
        facts["oddities"] = [*facts.get("oddities", []), *told]
        facts["manifest"] = model.manifest.model_dump(mode="json", exclude={"files"})
    return facts


def _named(paths: Sequence[str]) -> dict[str, Model]:
    """Open all before the first long work; by id, or by path where ids repeat."""
    models = [(path, open_model(path)) for path in paths]
    ids = [model.id for _, model in models]
    return {path if ids.count(model.id) > 1 else model.id: model for path, model in models}
