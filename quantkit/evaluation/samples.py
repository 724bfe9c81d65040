"""What one evaluation found, with the values by which two of them are compared in pairs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from quantkit.ledger import Metric, OnText
from quantkit.ledger.drift import Flips
from quantkit.ledger.prompt_drift import PromptDrift

METRICS_VERSION = 3
"""Raised when a metric is computed in another way: results of two versions do not compare."""
KEPT_VERSION = 3
"""Raised when more or something else is kept of an evaluation: then it is made again."""


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Answers(_Kept):
    """The questions of a task, in the order in which all models are asked.

    ``picks``: the likeliest choice, -1 where the task offers none, or what was written. ``total``:
    of how many questions in random order these are the first; None where all were asked.
    """

    subjects: list[str]
    right: list[bool]
    picks: list[int] | list[str]
    total: int | None = None

    def of(self, subject: str) -> Answers:
        """The questions of one subject."""
        kept = [i for i, name in enumerate(self.subjects) if name == subject]
        return Answers(
            subjects=[subject] * len(kept),
            right=[self.right[i] for i in kept],
            picks=[self.picks[i] for i in kept],
            total=self.total,
        )

    def first(self, n: int) -> Answers:
        """The ``n`` questions that were asked first."""
        return Answers(
            subjects=self.subjects[:n],
            right=self.right[:n],
            picks=self.picks[:n],
            total=self.total,
        )


class MeasuredText(OnText):
    """One model on one text, with what pairs of models are compared by.

    ``windows``: the mean of each window by metric, nats: ``ppl`` holds its negative log
    likelihood, ``kld_mean`` its divergence.
    """

    windows: dict[str, list[float]]


class Evaluated(_Kept):
    """One model's metrics, where it drifted, and what pairs of models are compared by.

    ``metrics``: of tasks and prompts. ``answers`` by the name of the accuracy.
    """

    texts: dict[str, MeasuredText] = Field(default_factory=dict)
    metrics: dict[str, Metric] = Field(default_factory=dict)
    prompts: PromptDrift | None = None
    answers: dict[str, Answers] = Field(default_factory=dict)


def gaps(a: Answers, b: Answers) -> list[int]:
    """1 where a wrong answer of ``a`` is right in ``b``, -1 where a right one is wrong, else 0."""
    return [int(after) - int(before) for before, after in zip(a.right, b.right, strict=True)]


def flips(a: Answers, b: Answers) -> Flips:
    """How the answers of ``a`` changed in ``b``."""
    changes = list(zip(a.right, b.right, strict=True))
    return Flips(
        right_to_wrong=changes.count((True, False)),
        wrong_to_right=changes.count((False, True)),
        wrong_to_other=sum(
            not any(change) and one != other
            for change, one, other in zip(changes, a.picks, b.picks, strict=True)
        ),
    )
