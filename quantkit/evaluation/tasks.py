"""Any lm-eval task, through lm-eval's own task and metric code.

quantkit supplies the model class only (``quantkit.evaluation.language_model``).
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
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetNotFoundError
from lm_eval import utils as lm_eval_utils
from lm_eval.api import task as lm_eval_task
from lm_eval.tasks import TaskManager

from quantkit.errors import EvaluationError, RecipeError, did_you_mean, first_line
from quantkit.evaluation.language_model import EngineLM, OpenModel
from quantkit.evaluation.samples import Answers
from quantkit.evaluation.statistics import Estimate
from quantkit.ledger import is_accuracy
from quantkit.models.end_tokens import end_ids
from quantkit.system.files import sha256_json
from quantkit.system.packaged import packaged_directory, packaged_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPORTED_AS = {"mmlu_dev": "mmlu", "mmlu_csv": "mmlu", "wikitext_file": "wikitext"}
"""Tasks of ours that ask the same questions in the same way as a task of lm-eval."""

_BOOTSTRAPS = 1000
"""For metrics that have no closed form of their standard error; 0 would leave out all."""

_FEWSHOT_SEED = 1234
"""lm-eval's own, so that the same examples are drawn."""


@dataclass(frozen=True)
class TaskResult:
    """What one task gave: its metrics by ledger name, how it was asked, and every answer.

    ``answers``: one entry per question: its subtask, its subject, its number there, the key, the
    likelihood of each choice in nats or what was written, by the filter that it went through; and
    by the metric that counts it (none where the task has no accuracy), whether it is ``right``, and
    the ``pick``.
    """

    metrics: dict[str, Estimate]
    protocol: dict[str, Any]
    answers: list[dict[str, Any]]
    total: int | None = None
    """The number of questions that ``answers`` are the first of, in random order; None where all
    were asked."""


@dataclass(frozen=True)
class Part:
    """Some questions of a task that is ``loaded``: their numbers, ascending, by subtask."""

    loaded: Any
    questions: Mapping[str, Sequence[int]]


def run_task(
    task: str,
    open_model: OpenModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    data: Mapping[str, str] | None = None,
    part: Part | None = None,
) -> TaskResult:
    """Run one task of ours, one that lm-eval knows, or the path of a YAML file.

    ``shots``: examples in the prompt, the task's own default where None; ``limit``: at most so
    many questions per subtask; ``chat``: each question as a user's turn, in the tokenizer's chat
    template; ``data``: where tasks find their questions, by the task's name; ``part``: ask these
    questions, and no others. Raise RecipeError for an unknown task, EvaluationError where it cannot
    be run.
    """
    if chat and not tokenizer.chat_template:
        raise EvaluationError(f"{task}: the model has no chat template; evaluate it without --chat")
    ends = end_ids(Path(tokenizer.name_or_path), tokenizer.eos_token_id)
    model = EngineLM(open_model, tokenizer, max_length, task, ends)
    with quiet(), _templates_compiled_once():
        loaded = part.loaded if part else load_task(task, data or {}, shots)
        name = next(iter(loaded["groups"] or loaded["tasks"]))
        samples = {leaf: list(docs) for leaf, docs in part.questions.items()} if part else None
        if samples is not None:
            # lm-eval asks every question of a task that ``samples`` does not name.
            kept = {leaf: loaded["tasks"][leaf] for leaf in samples}
            loaded, limit = {**loaded, "tasks": kept}, None
        for leaf in loaded["tasks"].values():
            leaf.set_fewshot_seed(seed=_FEWSHOT_SEED)
        # Not simple_evaluate, which adds a description of the machine and starts git for it.
        results = lm_eval.evaluate(
            model,
            loaded,
            limit=limit,
            samples=samples,
            bootstrap_iters=_BOOTSTRAPS,
            apply_chat_template=chat,
        )
    asked = sum(results["n-samples"][leaf]["effective"] for leaf in loaded["tasks"])
    protocol = {
        "task": name,
        "version": results["versions"][name],
        "shots": sorted({results["n-shot"][leaf] for leaf in loaded["tasks"]}),
        "questions": asked,
        "prompts": f"lm-eval {lm_eval.__version__}",
        "prompts_sha256": model.prompts_sha256,
    }
    if chat:
        protocol["chat_template_sha256"] = sha256_json(str(tokenizer.chat_template))
    prefix = _REPORTED_AS.get(name, name)
    metrics = {
        f"{prefix}_{metric}": Estimate(value, stderr, asked)
        for metric, value, stderr in _numbers(results["results"][name])
    }
    return TaskResult(metrics, protocol, _answers(results["samples"], prefix))


def answers(result: TaskResult) -> dict[str, Answers]:
    """Who was right where, for tests in pairs, by the metric that counts it."""
    given = result.answers
    return {
        name: Answers(
            subjects=[answer["subject"] for answer in given],
            right=[answer["right"][name] for answer in given],
            total=result.total,
            picks=[answer["pick"][name] for answer in given],
        )
        for name in result.metrics
        if all(name in answer["right"] for answer in given)
    }


def load_task(task: str, data: Mapping[str, str], shots: int | None) -> Any:
    """lm-eval's ``tasks`` and ``groups`` of one name, their data read and their shots set."""
    manager = _task_manager(task, tuple(sorted(data.items())))
    try:
        loaded = manager.load([task])
    except (ConnectionError, DatasetNotFoundError) as error:
        raise EvaluationError(
            f"{task}: its data is not in {HF_DATASETS_CACHE}, and the hub cannot be reached "
            f"({first_line(error)}); run it once with a network, or take a task with data of your "
            "own (wikitext_file, mmlu_csv, or a YAML file as evals/template.yaml)"
        ) from error
    except (OSError, ImportError) as error:  # the task's data, or a package that it needs
        raise EvaluationError(f"{task}: {first_line(error)}") from error
    if len(loaded["tasks"]) > 1 and not loaded["groups"]:
        raise EvaluationError(f"{task}: is a set of tasks; name one: {', '.join(loaded['tasks'])}")
    for leaf in loaded["tasks"].values():
        if getattr(leaf, "UNSAFE_CODE", False):
            raise EvaluationError(f"{task}: runs code that the model writes; quantkit does not")
        if getattr(leaf, "MULTIMODAL", False):
            raise EvaluationError(f"{task}: shows pictures; quantkit asks in text only")
        own = leaf.get_config("num_fewshot")
        # lm-eval's rule: a task that says 0 itself is made for 0.
        leaf.set_config(key="num_fewshot", value=own if own == 0 or shots is None else shots)
        if leaf.get_config("num_fewshot") is None:
            leaf.set_config(key="num_fewshot", value=0)
    return loaded


@cache
def _task_manager(task: str, data: tuple[tuple[str, str], ...]) -> TaskManager:
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
        # Where a task's own files lie beside it.
        metadata={**dict(data), "directory": str(own.get(task, Path(task)).parent)},
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
        name = _named(metric, filter_)
        yield name, float(value), float(stderr) if isinstance(stderr, (int, float)) else None


def _named(metric: str, filter_: str) -> str:
    return metric if filter_ == "none" else f"{metric}_{filter_}"


def _answers(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], prefix: str
) -> list[dict[str, Any]]:
    """One entry per question; lm-eval has one for each filter that an answer went through."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for task, of_task in samples.items():
        for sample in of_task:
            answer = found.setdefault(
                (task, sample["doc_id"]),
                {
                    "task": task,
                    "doc": sample["doc_id"],
                    "subject": str(sample["doc"].get("subject", task)),
                    "target": str(sample["target"]),
                    "right": {},
                    "pick": {},
                },
            )
            _add(answer, sample, prefix)
    return list(found.values())


def _add(answer: dict[str, Any], sample: Mapping[str, Any], prefix: str) -> None:
    """What the model said, likelihoods or a text, and whether it was right."""
    responses, filter_ = sample["filtered_resps"], sample["filter"]
    pick: int | str
    if all(isinstance(response, float | tuple | list) for response in responses):
        # With or without whether they are greedy.
        offered = [r if isinstance(r, float) else r[0] for r in responses]
        answer["loglikelihoods"] = offered
        pick = offered.index(max(offered)) if len(offered) > 1 else -1
    else:
        pick = "\n".join(map(str, responses))
        answer.setdefault("written", {})[filter_] = pick
    for metric in sample["metrics"]:
        name = f"{prefix}_{_named(metric, filter_)}"
        if is_accuracy(name) and sample[metric] in (0, 1):
            answer["right"][name] = bool(sample[metric])
            answer["pick"][name] = pick


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """lm-eval compiles the prompt's template again for each example of each question: on a small
    model that takes a third of the time of MMLU with five shots."""
    templates = lm_eval_utils.env
    plain = templates.from_string
    templates.from_string = cache(plain)
    try:
        yield
    finally:
        templates.from_string = plain


@contextmanager
def quiet() -> Iterator[None]:
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
