"""Sentences that carry names from the ledger, kept apart so that each page can set them safely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """A string from the ledger inside a sentence: set in monospace, escaped by the page."""

    text: str


Prose = tuple[str | Name, ...]


def listing(ids: Sequence[str], last: str = "and") -> Prose:
    """``a``, ``a and b``, ``a, b and c``."""
    parts: list[str | Name] = []
    for index, id_ in enumerate(ids):
        if index:
            parts.append(f" {last} " if index == len(ids) - 1 else ", ")
        parts.append(Name(id_))
    return tuple(parts)


def plain(prose: Prose) -> str:
    """The sentence without any setting."""
    return "".join(part.text if isinstance(part, Name) else part for part in prose)
