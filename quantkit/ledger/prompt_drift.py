"""What a ledger says of a variant's answers to the user's own prompts, beside the reference's."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptGroup(_Entry):
    """All prompts, or those of one category: how the variant's greedy answers differ.

    ``n`` prompts; shares of them, each ± one standard error (None for a single prompt).
    """

    category: str | None
    """None: those without one."""
    n: int
    exact_match: float
    """Share of answers that are the reference's, token by token."""
    exact_match_stderr: float | None
    text_match: float
    """The same of the text, without the space around it."""
    text_match_stderr: float | None
    first_difference_mean: float | None
    """Which token is the first to differ, counted from 1, over the answers that differ; None where
    none does."""
    first_difference_median: float | None
    kld_mean: float
    """Nats per token of the reference's answers, on which both models are asked."""
    kld_stderr: float | None
    """Over prompts: tokens of one answer depend on each other."""
    reference_tokens: float
    """Mean length of the reference's answers."""
    tokens: float
    reference_cut: int
    """How many answers of the reference were cut off at the longest length allowed."""
    cut: int


class AnswerPair(_Entry):
    """One prompt that the two answer differently: what they say alike, and how each goes on.

    Texts are cut where they are long, which an ellipsis shows.
    """

    id: str
    category: str | None
    prompt: str
    """Its end; of a chat that of the last message."""
    common: str
    """What both answers begin with, up to the first token that differs."""
    reference: str
    """How the reference's answer goes on; empty where it ends."""
    answer: str
    """How the variant's goes on."""
    first_difference: int
    """The first token that differs, counted from 1."""
    kld: float
    """Nats per token of the reference's answer."""
    reference_tokens: int
    tokens: int


class PromptDrift(_Entry):
    """A variant's answers against the reference's: in all, by category, and the worst pairs."""

    overall: PromptGroup
    categories: list[PromptGroup]
    """In the order in which the file names them; empty where it names none."""
    most_different: list[AnswerPair]
    """The answers whose texts differ that have the greatest divergence, greatest first."""
