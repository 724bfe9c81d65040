"""Questions in random order, asked until a variant's verdict against the reference is settled."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from quantkit.engines.base import config_of
from quantkit.errors import EvaluationError
from quantkit.evaluation import sequential, statistics
from quantkit.evaluation.language_model import KeptModel
from quantkit.evaluation.samples import KEPT_VERSION, METRICS_VERSION, Answers, Evaluated, gaps
from quantkit.evaluation.tasks import Part, TaskResult, answers, load_task, quiet, run_task
from quantkit.system.progress import say

if TYPE_CHECKING:
    from quantkit.engines.base import Engine
    from quantkit.evaluation.plan import EvaluationPlan
    from quantkit.models.checkpoint import Checkpoint
    from quantkit.models.variant import Model

SEED = 0
"""The seed of the order of questions: the same for all models and runs, so that answers are
paired."""


class Keep(Protocol):
    """Gives ``make()``, or what it gave before for the same model and ``key``."""

    def __call__(
        self, model: Model, key: Any, make: Callable[[], TaskResult], shape: type[TaskResult]
    ) -> TaskResult:
        """``shape``: the type that ``make()`` gives, for reading it again."""
        ...


class EarlyStop:
    """Asks the models of one evaluation, and the reference no further than any of them needs.

    The variants go first and the reference last: then it is known how far it has to answer, and
    most of it was asked already. One model is loaded at a time, as two might not fit: while the
    reference answers, the variant is put away. ``tolerance`` in points; ``variants``: how many are
    compared with each other and the reference, which share one α.
    """

    def __init__(
        self,
        source: Checkpoint,
        plan: EvaluationPlan,
        tolerance: float,
        variants: int,
        keep: Keep | None = None,
    ) -> None:
        self._source = source
        self._plan = plan
        self._tolerance = tolerance
        self._comparisons = variants * (variants + 1) // 2
        self._keep = keep or (lambda _model, _key, make, _shape: make())
        self._references: dict[str, _Interview] = {}
        self._needed: dict[str, int] = {}

    def key(self, model: Model) -> dict[str, Any]:
        """What a result depends on beside the plan: the rule for stopping, or how far to go."""
        if self._is_source(model):
            return {"seed": SEED, "needed": self._needed}
        return {"seed": SEED, "tolerance": self._tolerance, "comparisons": self._comparisons}

    def note(self, variant: Evaluated) -> None:
        """Remember how far the reference has to answer for a variant, whenever it was asked."""
        for name, given in variant.answers.items():
            self._needed[name] = max(self._needed.get(name, 0), len(given.right))

    def measure(self, model: Model, engine: Engine, task: str) -> TaskResult:
        """The model's answers up to a verdict; of the reference as many as the variants needed.

        Raise EvaluationError where the task has no accuracy, and what ``run_task`` raises.
        """
        reference = self._references.get(task)
        if reference is None:
            questions = _Questions.load(task, self._plan)
            own = self._plan.engine_of(self._source)
            reference = _Interview(self._source, own, questions, self._plan, self._keep)
            self._references[task] = reference
        if self._is_source(model):
            with closing(reference):
                reference.ask(1)
                needed = [self._needed.get(name, 0) for name in reference.accuracies]
                reference.ask(max(needed, default=0) or reference.total)
            return reference.result()
        with closing(
            _Interview(model, engine, reference.questions, self._plan, self._keep)
        ) as variant:
            self._ask_until_settled(variant, reference)
        return variant.result()

    def _ask_until_settled(self, variant: _Interview, reference: _Interview) -> None:
        total = variant.total
        for end in sequential.chunk_ends(total):
            if reference.asked < end:
                variant.close()
                with closing(reference):
                    reference.ask(end)
            variant.ask(end)
            before, after = reference.accuracies, variant.accuracies
            found = [gaps(before[name].first(end), after[name].first(end)) for name in after]
            tolerance = self._tolerance / 100
            if all(sequential.is_over(g, total, tolerance, self._comparisons) for g in found):
                break
        say(f"{variant.name}: {end} of {total} questions asked")

    def _is_source(self, model: Model) -> bool:
        return model.path == self._source.path


@dataclass(frozen=True)
class _Questions:
    """A task whose questions, as subtask and number there, stand in random ``order``."""

    task: str
    loaded: Any
    order: list[tuple[str, int]]

    @classmethod
    def load(cls, task: str, plan: EvaluationPlan) -> _Questions:
        """All subtasks together: only then is each question like the next."""
        with quiet():
            loaded = load_task(task, plan.data, plan.shots)
        order = [
            (name, number)
            for name, leaf in loaded["tasks"].items()
            for number in range(len(leaf.eval_docs))[: plan.limit]
        ]
        random.Random(SEED).shuffle(order)
        return cls(task, loaded, order)


class _Interview:
    """One model's answers to a task's questions, in their order, as far as they were asked."""

    def __init__(
        self,
        model: Model,
        engine: Engine,
        questions: _Questions,
        plan: EvaluationPlan,
        keep: Keep,
    ) -> None:
        self.questions = questions
        self.total = len(questions.order)
        self.name = f"{model.id}: {questions.task}"
        self._answers: list[dict[str, Any]] = []
        self._first: TaskResult | None = None
        self._model, self._engine, self._plan, self._keep = model, engine, plan, keep
        self._kept = KeptModel(
            lambda context: engine.language_model(model, context), plan.max_length
        )

    @property
    def asked(self) -> int:
        """How many questions were asked so far."""
        return len(self._answers)

    @property
    def accuracies(self) -> dict[str, Answers]:
        """The answers so far, by the metric that counts them."""
        assert self._first is not None
        return answers(replace(self._first, answers=self._answers, total=self.total))

    def ask(self, count: int) -> None:
        """Ask until at least ``count`` were asked, in the chunks in which all models are asked."""
        for end in sequential.chunk_ends(self.total):
            if self.asked >= count:
                return
            if self.asked < end:
                self._ask_chunk(end)

    def result(self) -> TaskResult:
        """Accuracy with the error of a simple random sample; the protocol says how it was drawn."""
        assert self._first is not None
        return TaskResult(
            {
                name: statistics.proportion(torch.tensor(given.right))
                for name, given in self.accuracies.items()
            },
            {
                **self._first.protocol,
                "questions": self.total,
                "until": "decided",
                "order_seed": SEED,
            },
            self._answers,
            self.total,
        )

    def close(self) -> None:
        """Unload the model; it is loaded again when it is asked again."""
        self._kept.close()

    def _ask_chunk(self, end: int) -> None:
        wanted = self.questions.order[self.asked : end]
        by_subtask: dict[str, list[int]] = {}
        for subtask, number in sorted(wanted):
            by_subtask.setdefault(subtask, []).append(number)
        plan, task = self._plan, self.questions.task
        key = {
            "metrics_version": METRICS_VERSION,
            "kept_version": KEPT_VERSION,
            "engine": str(config_of(self._engine)),
            "task": task,
            "shots": plan.shots,
            "chat": plan.chat,
            "data": plan.files,
            "questions": by_subtask,
        }
        found = self._keep(
            self._model,
            key,
            lambda: run_task(
                task,
                self._kept,
                plan.tokenizer,
                plan.max_length,
                chat=plan.chat,
                part=Part(self.questions.loaded, by_subtask),
            ),
            TaskResult,
        )
        by_question = {(answer["task"], answer["doc"]): answer for answer in found.answers}
        self._answers += [by_question[question] for question in wanted]
        self._first = self._first or found
        if not self.accuracies:
            raise EvaluationError(
                f"{task}: has no accuracy, so no verdict on it can be decided; "
                "evaluate it without `until`"
            )
