"""What a ledger says of drift: where a variant left its reference, and what pairs of rows show."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ALPHA = 0.05
"""How often a verdict may be wrong: 'different' where nothing differs, 'equivalent' where
the difference is as large as the tolerance."""

Verdict = Literal["better", "worse", "equivalent", "undecided"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Bin(_Entry):
    """The scored positions of one kind, ``low`` to ``high``: how many, and how they drifted."""

    low: float
    high: float
    n: int
    kld_mean: float | None
    """None where there are no such positions."""
    stderr: float | None


class WorstPosition(_Entry):
    """A place where the variant left the reference: the text before it, and what each expected.

    Probabilities are those that each model gives to its own most likely token.
    """

    window: int
    position: int
    kld: float
    before: str
    true: str
    """The token that really comes next."""
    delta_p: float
    """Its probability: the variant's minus the reference's."""
    reference_top: str
    reference_confidence: float
    top: str
    confidence: float


class Profile(_Entry):
    """Where a variant drifted from the reference on one text."""

    by_position: list[Bin]
    """Positions in the window, ``low`` and ``high`` included."""
    by_confidence: list[Bin]
    """Probability of the reference's most likely token."""
    worst: list[WorstPosition]


class Flips(_Entry):
    """Answers that changed from the first row of a pair to the second."""

    right_to_wrong: int
    wrong_to_right: int
    wrong_to_other: int
    """Wrong before and after, with another choice."""


class SubjectDrift(_Entry):
    """One subject of a task; ``p_adjusted`` by Holm over all subjects of the pair."""

    subject: str
    n: int
    right_to_wrong: int
    wrong_to_right: int
    p_adjusted: float


class Comparison(_Entry):
    """Row ``b`` against row ``a`` in one measure, paired over windows or questions.

    ``drift``, ``low`` and ``high`` (95 %) in ``unit``; ``p`` of no difference, ``p_equivalent`` of
    one of ``tolerance`` or more, both adjusted by Holm over all pairs of the measure, those on
    other texts included. A measure
    without a tolerance (``kld_mean``) can't be equivalent. With ``of``, the p-values and the
    interval hold wherever one stopped.
    """

    measure: str
    """The metric's name: ``ppl``, ``kld_mean``, ``mmlu_acc``."""
    text: str | None = None
    """On which text; None for questions."""
    a: str
    b: str
    unit: Literal["percent", "nats", "points"]
    drift: float
    low: float | None
    high: float | None
    n: int
    """Windows or questions."""
    of: int | None = None
    """The number of questions that there are, where they were asked in random order until
    decided."""
    p: float
    p_adjusted: float
    p_equivalent: float | None
    tolerance: float | None
    verdict: Verdict
    more: int | None = None
    """How many more windows or questions would decide what is undecided; None: out of reach."""
    flips: Flips | None = None
    subjects: int | None = None
    """How many subjects were tested separately; against the reference only."""
    changed_subjects: list[SubjectDrift] = Field(default_factory=list)
    """Those in which any answer became right or wrong."""

    @property
    def apart(self) -> bool:
        """Whether the data tell the two rows apart, however little lies between them."""
        return self.p_adjusted <= ALPHA
