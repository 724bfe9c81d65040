"""Evaluate: how far a model has drifted from its reference, on the same tokens and questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.engines.base import label
from quantkit.errors import EvaluationError
from quantkit.evaluate.samples import METRICS_VERSION, Evaluated
from quantkit.files import write_json
from quantkit.ledger import ACCURACY, Metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantkit.engines.base import Engine
    from quantkit.evaluate.perplexity import Windows
    from quantkit.evaluate.reference import Reference
    from quantkit.variant import Model


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
) -> Evaluated:
    """Measure one model; without a ``reference``, what needs none.

    Metrics: ``ppl``, ``non_finite``; ``ppl_ratio``, ``kld_mean``, ``kld_median``, ``kld_p99``,
    ``kld_max``, ``top1_agreement``, ``top5_agreement``, ``delta_p_mean``, ``delta_p_rms``,
    ``delta_p_<quantile>`` (nats and shares); ``<task>_<metric>`` of each task (``mmlu_acc``).
    ``details``: a directory that receives the values behind them: ``positions.safetensors``
    (``divergence.Drift`` by window and position) and ``<task>.json`` (every answer).

    Raise EvaluationError for non-finite logits, and what the engine raises.
    """
    from quantkit.engines import scoring_engine
    from quantkit.evaluate.text import measure_text

    engine = scoring_engine(model)
    engine.check(model)
    whole = Evaluated()
    if plan.windows is not None:
        whole = measure_text(model, engine, plan.windows, reference, plan, details)
    for task in plan.tasks:
        found = _measure_task(model, engine, task, plan, details)
        for name in found.metrics.keys() & whole.metrics.keys():
            raise EvaluationError(f"{task}: a second task that reports {name}; take one of them")
        whole = whole.model_copy(
            update={
                "metrics": whole.metrics | found.metrics,
                "answers": whole.answers | found.answers,
            }
        )
    return whole


def _measure_task(
    model: Model, engine: Engine, task: str, plan: EvaluationPlan, details: Path | None
) -> Evaluated:
    from quantkit.evaluate.tasks import answers, run_task

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
    metrics = {
        name: Metric(
            value=estimate.value,
            stderr=estimate.stderr,
            n=estimate.n,
            reference=None,
            protocol=protocol,
            engine=label(engine),
        )
        for name, estimate in result.metrics.items()
    }
    accuracies = [name for name in metrics if name.endswith(ACCURACY)]
    given = answers(result) if accuracies else None
    return Evaluated(metrics=metrics, answers={name: given for name in accuracies if given})
