"""Evaluate: how far a model has drifted from its reference, on the same tokens and questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import EvaluationError
from quantkit.files import write_json
from quantkit.ledger import REFERENCE, Metric
from quantkit.progress import track

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from quantkit.engines.base import Engine
    from quantkit.evaluate.divergence import Positions
    from quantkit.evaluate.perplexity import Windows
    from quantkit.evaluate.reference import Reference
    from quantkit.evaluate.statistics import Estimate
    from quantkit.variant import Model

METRICS_VERSION = 1
"""Raised when a metric is computed in another way: results of two versions do not compare."""


@dataclass(frozen=True)
class EvaluationPlan:
    """What is asked of every model alike.

    ``windows``: the text, or None for tasks only. ``tokenizer`` and ``max_length`` (tokens) are
    the source's: questions become the same ids on every engine. ``shots`` and ``limit``: see
    ``run_task``. ``metadata`` goes to the tasks' data sets (``mmlu_directory``).
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    windows: Windows | None = None
    tasks: tuple[str, ...] = ()
    shots: int | None = None
    limit: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def evaluate(
    model: Model,
    reference: Reference | None,
    plan: EvaluationPlan,
    details: Path | None = None,
) -> dict[str, Metric]:
    """Measure one model; without a ``reference``, what needs none.

    Keys: ``ppl``, ``kld_mean``, ``kld_median``, ``kld_p99``, ``kld_max``, ``top1_agreement``
    (nats and shares), and ``<task>_<metric>`` of each task (``mmlu_acc``). ``details``: a
    directory that receives the values behind them, for paired tests: ``positions.safetensors``
    (nll, kld, same_top by window and position) and ``<task>.json`` (every answer).

    Raise EvaluationError for non-finite logits, and what the engine raises.
    """
    from quantkit.engines import scoring_engine

    engine = scoring_engine(model)
    engine.check(model)
    metrics: dict[str, Metric] = {}
    if plan.windows is not None:
        metrics |= _measure_text(model, engine, plan.windows, reference, plan, details)
    for task in plan.tasks:
        found = _measure_task(model, engine, task, plan, details)
        for name in found.keys() & metrics.keys():
            raise EvaluationError(f"{task}: a second task that reports {name}; take one of them")
        metrics |= found
    return metrics


def require_comparable(name: str, one: Metric, other: Metric) -> None:
    """Raise EvaluationError where two results were not measured in the same way."""
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


def _measure_text(
    model: Model,
    engine: Engine,
    windows: Windows,
    reference: Reference | None,
    plan: EvaluationPlan,
    details: Path | None,
) -> dict[str, Metric]:
    if reference is not None and reference.windows != windows:
        raise EvaluationError("the reference was built on other tokens; build it on the plan's")
    vocabulary = len(plan.tokenizer)
    if reference is not None:
        # Some tokenizers know more tokens than the model has rows.
        vocabulary = min(vocabulary, reference.vocabulary)
    values = _score(model, engine, windows, reference, vocabulary)
    if values.non_finite:
        raise EvaluationError(
            f"{model.path}: non-finite logits at {values.non_finite} of {values.nll.numel()} "
            "scored positions; nothing is computed from the rest"
        )
    if details is not None:
        _write_positions(values, len(windows.ids), details)
    version = reference.engine if reference and reference.is_of(model) else _version(engine)
    protocol = {
        **windows.protocol(),
        "vocabulary": vocabulary,
        "metrics_version": METRICS_VERSION,
    }
    drift = protocol | {"reference_sha256": reference.source if reference else None}
    return {
        name: Metric(
            value=estimate.value,
            stderr=estimate.stderr,
            n=estimate.n,
            reference=None if name == "ppl" else REFERENCE,
            protocol=protocol if name == "ppl" else drift,
            engine=version,
        )
        for name, estimate in _summaries(values)
    }


def _score(
    model: Model,
    engine: Engine,
    windows: Windows,
    reference: Reference | None,
    vocabulary: int,
) -> Positions:
    """One pass over the windows: each window's logits are scored and dropped."""
    from quantkit.evaluate import divergence

    def against_reference(rows: Iterator[torch.Tensor]) -> Iterator[Positions]:
        for index, logits in enumerate(track(rows, f"{model.id}: windows", len(windows.ids))):
            yield divergence.score(
                _cut(logits, vocabulary, model),
                windows.targets(index),
                None if reference is None else reference.logits(index)[:, :vocabulary],
            )

    if reference is not None and reference.is_of(model):
        again = (reference.logits(index) for index in range(len(windows.ids)))
        return divergence.join(list(against_reference(again)))
    inputs = windows.inputs()
    with engine.scorer(model, windows.context) as scorer:
        rows = scorer.logits(inputs, [windows.first] * len(inputs))
        return divergence.join(list(against_reference(rows)))


def _cut(logits: torch.Tensor, vocabulary: int, model: Model) -> torch.Tensor:
    """Without the rows by which a format or a checkpoint pads the vocabulary."""
    if logits.shape[1] < vocabulary:
        raise EvaluationError(
            f"{model.path}: a vocabulary of {logits.shape[1]} tokens, the tokenizer has "
            f"{vocabulary}; it was not made from this source"
        )
    return logits[:, :vocabulary]


def _summaries(values: Positions) -> Iterator[tuple[str, Estimate]]:
    from quantkit.evaluate import statistics

    yield "ppl", statistics.perplexity(values.nll)
    if values.kld is not None and values.same_top is not None:
        yield "kld_mean", statistics.mean(values.kld)
        yield "kld_median", statistics.quantile(values.kld, 0.5)
        yield "kld_p99", statistics.quantile(values.kld, 0.99)
        yield "kld_max", statistics.quantile(values.kld, 1.0)
        yield "top1_agreement", statistics.proportion(values.same_top)


def _write_positions(values: Positions, windows: int, details: Path) -> None:
    from safetensors.torch import save_file

    columns = {"nll": values.nll, "kld": values.kld, "same_top": values.same_top}
    details.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            name: column.reshape(windows, -1).contiguous()
            for name, column in columns.items()
            if column is not None
        },
        details / "positions.safetensors",
    )


def _measure_task(
    model: Model, engine: Engine, task: str, plan: EvaluationPlan, details: Path | None
) -> dict[str, Metric]:
    from quantkit.evaluate.tasks import run_task

    result = run_task(
        task,
        lambda context: engine.scorer(model, context),
        plan.tokenizer,
        plan.max_length,
        shots=plan.shots,
        limit=plan.limit,
        metadata=plan.metadata,
    )
    if details is not None:
        details.mkdir(parents=True, exist_ok=True)
        write_json(details / f"{Path(task).stem}.json", result.answers)
    protocol: dict[str, Any] = {**result.protocol, "metrics_version": METRICS_VERSION}
    return {
        name: Metric(
            value=estimate.value,
            stderr=estimate.stderr,
            n=estimate.n,
            reference=None,
            protocol=protocol,
            engine=_version(engine),
        )
        for name, estimate in result.metrics.items()
    }


def _version(engine: Engine) -> str:
    return f"{engine.name} {engine.version()}"
