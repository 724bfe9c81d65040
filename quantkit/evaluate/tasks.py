"""Any lm-eval task that asks for likelihoods, through lm-eval's own task and metric code.

quantkit supplies the model class only (``quantkit.evaluate.language_model``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
from lm_eval.api import task as lm_eval_task
from lm_eval.tasks import TaskManager

from quantkit.errors import EvaluationError, RecipeError, did_you_mean
from quantkit.evaluate.language_model import WRITES, OpenScorer, ScorerLM
from quantkit.evaluate.samples import Answers
from quantkit.evaluate.statistics import Estimate
from quantkit.packaged import packaged_directory, packaged_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPORTED_AS = {"mmlu_dev": "mmlu", "mmlu_csv": "mmlu"}
"""Tasks of ours that ask the same questions in the same way as a task of lm-eval."""

_BOOTSTRAPS = 1000
"""For metrics that have no closed form of their standard error; 0 would leave out all."""

_FEWSHOT_SEED = 1234
"""lm-eval's own, so that the same examples are drawn."""


@dataclass(frozen=True)
class TaskResult:
    """What one task gave: its metrics by ledger name, how it was asked, and every answer.

    ``answers``: one entry per question: its subtask, its subject, its number there, the key, the
    likelihood of each choice in nats, and whether lm-eval counts it as right (None where the task
    has no accuracy).
    """

    metrics: dict[str, Estimate]
    protocol: dict[str, Any]
    answers: list[dict[str, Any]]


def run_task(
    task: str,
    open_scorer: OpenScorer,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    shots: int | None = None,
    limit: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> TaskResult:
    """Run one task of ours, one that lm-eval knows, or the path of a YAML file.

    ``shots``: examples in the prompt, the task's own default where None; ``limit``: at most so
    many questions per subtask; ``metadata`` goes to the task's data set. Raise RecipeError for an
    unknown task, EvaluationError where it cannot be run.
    """
    model = ScorerLM(open_scorer, tokenizer, max_length, task)
    with _quiet():
        loaded = _load_task(task, metadata or {}, shots)
        name = next(iter(loaded["groups"] or loaded["tasks"]))
        # Not simple_evaluate, which adds a description of the machine and starts git for it.
        results = lm_eval.evaluate(model, loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS)
    asked = sum(results["n-samples"][leaf]["effective"] for leaf in loaded["tasks"])
    protocol = {
        "task": name,
        "version": results["versions"][name],
        "shots": sorted({results["n-shot"][leaf] for leaf in loaded["tasks"]}),
        "questions": asked,
        "prompts": f"lm-eval {lm_eval.__version__}",
        "prompts_sha256": model.prompts_sha256,
    }
    prefix = _REPORTED_AS.get(name, name)
    metrics = {
        f"{prefix}_{metric}": Estimate(value, stderr, asked)
        for metric, value, stderr in _numbers(results["results"][name])
    }
    return TaskResult(metrics, protocol, _answers(results["samples"]))


def answers(result: TaskResult) -> Answers | None:
    """Who was right where, for tests in pairs; None where the task does not count that way."""
    if any(answer["right"] is None for answer in result.answers):
        return None
    offered = [answer["loglikelihoods"] for answer in result.answers]
    return Answers(
        subjects=[answer["subject"] for answer in result.answers],
        right=[answer["right"] for answer in result.answers],
        picks=[choices.index(max(choices)) if len(choices) > 1 else -1 for choices in offered],
    )


def _load_task(task: str, metadata: Mapping[str, str], shots: int | None) -> Any:
    """lm-eval's ``tasks`` and ``groups`` of one name, their data read and their shots set."""
    manager = _task_manager(task, tuple(sorted(metadata.items())))
    try:
        loaded = manager.load([task])
    except (OSError, ImportError) as error:  # the task's data, or a package that it needs
        raise EvaluationError(f"{task}: {(str(error) or repr(error)).splitlines()[0]}") from error
    if len(loaded["tasks"]) > 1 and not loaded["groups"]:
        raise EvaluationError(f"{task}: is a set of tasks; name one: {', '.join(loaded['tasks'])}")
    for leaf in loaded["tasks"].values():
        if leaf.OUTPUT_TYPE == "generate_until":
            raise EvaluationError(WRITES.format(task=task))
        own = leaf.get_config("num_fewshot")
        # lm-eval's rule: a task that says 0 itself is made for 0.
        leaf.set_config(key="num_fewshot", value=own if own == 0 or shots is None else shots)
        if leaf.get_config("num_fewshot") is None:
            leaf.set_config(key="num_fewshot", value=0)
        leaf.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


@cache
def _task_manager(task: str, metadata: tuple[tuple[str, str], ...]) -> TaskManager:
    """Knows our tasks, and lm-eval's (10 s to index) where ``task`` is none of ours."""
    own = {path.stem: path for path in packaged_files("evals")}
    is_path = task.endswith((".yaml", ".yml"))
    if is_path and not Path(task).is_file():
        raise RecipeError(f"{task}: no such file; expected an lm-eval task in YAML, or its name")
    # Ours build on lm-eval's MMLU and on nothing else of it.
    mmlu = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    manager = TaskManager(
        include_path=[str(mmlu), str(packaged_directory("evals"))],
        include_defaults=not is_path and task not in own,
        metadata=dict(metadata),
    )
    if not is_path and task not in manager.all_tasks:
        raise RecipeError(
            f"unknown task {task!r}; ours are {', '.join(own)}, lm-eval's are in `lm-eval ls tasks`"
            + did_you_mean(task, manager.all_tasks)
        )
    return manager


def _numbers(entry: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Metric, value and standard error out of ``acc,none: 0.5, acc_stderr,none: 0.02``."""
    for key, value in entry.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = entry.get(f"{metric}_stderr,{filter_}")
        name = metric if filter_ == "none" else f"{metric}_{filter_}"
        yield name, float(value), float(stderr) if isinstance(stderr, (int, float)) else None


def _answers(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "doc": sample["doc_id"],
            "subject": str(sample["doc"].get("subject", task)),
            "target": str(sample["target"]),
            "right": bool(sample["acc"]) if "acc" in sample else None,
            "loglikelihoods": [
                answer if isinstance(answer, float) else answer[0]
                for answer in sample["filtered_resps"]
            ],
        }
        for task, of_task in samples.items()
        for sample in of_task
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log and progress bars: quantkit shows its own."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval_task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval_task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval_task.tqdm = bar
