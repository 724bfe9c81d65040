"""Evaluate: how far a model has drifted from its reference, on the same tokens and questions."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.engines.base import config_of
from quantkit.errors import EvaluationError
from quantkit.evaluation.samples import METRICS_VERSION, Evaluated
from quantkit.ledger import Metric
from quantkit.system.files import write_json

if TYPE_CHECKING:
    from quantkit.engines.base import Engine
    from quantkit.evaluation.early_stop import EarlyStop
    from quantkit.evaluation.language_model import KeptModel
    from quantkit.evaluation.plan import EvaluationPlan
    from quantkit.evaluation.prompt_reference import ReferenceAnswers
    from quantkit.evaluation.reference import Reference
    from quantkit.evaluation.tasks import TaskResult
    from quantkit.models.variant import Model


def evaluate(
    model: Model,
    references: Mapping[str, Reference],
    plan: EvaluationPlan,
    details: Path | None = None,
    answers: ReferenceAnswers | None = None,
    early_stop: EarlyStop | None = None,
) -> Evaluated:
    """Measure one model; without ``references`` (one a text, by name), what needs none.

    Metrics of a text: ``ppl``, ``non_finite``; ``ppl_ratio``, ``kld_mean``, ``kld_<quantile>``,
    ``top1_agreement``, ``top5_agreement``, ``delta_p_mean``, ``delta_p_rms``,
    ``delta_p_<quantile>`` (nats and shares). Others: ``<task>_<metric>`` of each task
    (``mmlu_acc``); with ``answers``, the reference's to the user's prompts, what
    ``measure_prompts`` gives. ``details``: a directory that receives the values behind them:
    ``positions.safetensors`` (``divergence.Drift`` of each text by window and position) and
    ``<task>.json`` (every answer).
    ``early_stop``: ask no more questions than it wants; all of them where None.

    Raise EvaluationError for non-finite logits, and what the engine raises.
    """
    from quantkit.evaluation.text import measure_texts

    engine = plan.engine_of(model)
    whole = Evaluated()
    if plan.texts:
        texts = measure_texts(model, engine, plan.texts, references, plan.tokenizer, details)
        whole = Evaluated(texts=texts)
    if answers is not None:
        from quantkit.evaluation.prompts import measure_prompts

        found = measure_prompts(model, engine, answers, plan.tokenizer, details)
        metrics = whole.metrics | found.metrics
        whole = whole.model_copy(update={"metrics": metrics, "prompts": found.prompts})
    if not plan.tasks:
        return whole
    from quantkit.evaluation.language_model import KeptModel

    # One start for all tasks: a server takes its time.
    kept = KeptModel(lambda context: engine.language_model(model, context), plan.max_length)
    with closing(kept):
        for task in plan.tasks:
            if early_stop is not None:
                result = early_stop.measure(model, engine, task)
            else:
                result = _run_task(task, kept, plan)
            found = _measured(result, task, engine, details)
            for name in found.metrics.keys() & whole.metrics.keys():
                raise EvaluationError(
                    f"{task}: a second task that reports {name}; take one of them"
                )
            whole = whole.model_copy(
                update={
                    "metrics": whole.metrics | found.metrics,
                    "answers": whole.answers | found.answers,
                }
            )
    return whole


def _run_task(task: str, model: KeptModel, plan: EvaluationPlan) -> TaskResult:
    from quantkit.evaluation.tasks import run_task

    return run_task(
        task,
        model,
        plan.tokenizer,
        plan.max_length,
        shots=plan.shots,
        limit=plan.limit,
        chat=plan.chat,
        data=plan.data,
    )


def _measured(result: TaskResult, task: str, engine: Engine, details: Path | None) -> Evaluated:
    from quantkit.evaluation.tasks import answers

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
            engine=config_of(engine),
        )
        for name, estimate in result.metrics.items()
    }
    return Evaluated(metrics=metrics, answers=answers(result))
