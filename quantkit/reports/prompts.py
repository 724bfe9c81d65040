"""Answers to prompts: how many are the same, and those that differ the most."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.ledger import Ledger
from quantkit.ledger.prompt_drift import AnswerPair, PromptDrift, PromptGroup
from quantkit.reports.findings import Finding
from quantkit.reports.format import NOTHING, fixed, plus_minus
from quantkit.reports.prose import Name, Prose

COLUMNS = (
    "prompts",
    "same tokens",
    "same text",
    "first difference",
    "KLD, nats",
    "tokens",
    "reference's tokens",
    "cut off",
)
"""What ``Line.cells`` hold."""


@dataclass(frozen=True)
class Line:
    """One category of a variant, or all of them."""

    title: str
    overall: bool
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """One variant: its lines, all prompts first, and the pairs that differ the most."""

    id: str
    lines: tuple[Line, ...]
    pairs: tuple[AnswerPair, ...]


def answers(ledger: Ledger) -> list[Answers]:
    """Every variant that was asked; none where there were no prompts."""
    return [
        Answers(row.id, tuple(_lines(row.prompts)), tuple(row.prompts.most_different))
        for row in ledger.variants
        if row.prompts
    ]


def finding(ledger: Ledger) -> list[Finding]:
    """How many answers are the reference's; nothing where there were no prompts."""
    found = [(row.id, row.prompts.overall) for row in ledger.variants if row.prompts]
    if not found:
        return []
    text: Prose = (f"The reference's answer to {found[0][1].n:,} prompts, token by token: ",)
    for index, (id_, one) in enumerate(found):
        share = _share(one.exact_match, one.exact_match_stderr)
        text += (", " if index else "", Name(id_), f" ({share})")
    return [
        Finding("Answers to prompts", (*text, ". An answer that differs is not worse by that."))
    ]


def _lines(drift: PromptDrift) -> list[Line]:
    return [
        Line("all prompts", True, _cells(drift.overall)),
        *(Line(one.category or "no category", False, _cells(one)) for one in drift.categories),
    ]


def _cells(one: PromptGroup) -> tuple[str, ...]:
    return (
        f"{one.n:,}",
        _share(one.exact_match, one.exact_match_stderr),
        _share(one.text_match, one.text_match_stderr),
        _first_difference(one),
        " ".join(filter(None, plus_minus(one.kld_mean, one.kld_stderr))),
        fixed(one.tokens, 1),
        fixed(one.reference_tokens, 1),
        f"{one.cut} of {one.n}",
    )


def _share(value: float, stderr: float | None) -> str:
    """In percent; whole ones where there is no error to say how many digits it is worth."""
    shown, error = plus_minus(100 * value, None if stderr is None else 100 * stderr)
    return f"{shown} {error} %" if error else f"{fixed(100 * value, 0)} %"


def _first_difference(one: PromptGroup) -> str:
    if one.first_difference_median is None or one.first_difference_mean is None:
        return NOTHING
    return f"token {one.first_difference_median:g} (mean {fixed(one.first_difference_mean, 1)})"
