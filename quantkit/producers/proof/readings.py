"""Texts read by two tokenizers: which differ, and how that is told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.producers.proof import probe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHOWN = 6
"""Tokens of a reading that a message shows, from the one before the first that differs."""
_LONG = 80
"""Characters of a text that a message shows."""


@dataclass(frozen=True)
class Reading:
    """One text, and how an engine is asked to read it."""

    text: str
    add_special: bool = True
    parse_special: bool = True


Read = Callable[[Reading], list[int]]
"""What an engine makes of a text: ids."""


@dataclass(frozen=True)
class Difference:
    """A text that the source's tokenizer and an engine read differently, as ids."""

    reading: Reading
    expected: list[int]
    found: list[int]


def readings(
    tokenizer: Tokenizer, unlike: Collection[str] = (), marked: Sequence[str] = ()
) -> list[Reading]:
    """What is compared. ``unlike``: tokens that are special for one side only, which are left out
    of what is read as plain text; ``marked``: those that the other side does not make of others."""
    added = tokenizer.get_added_tokens_decoder().values()
    contents = list(dict.fromkeys([*(token.content for token in added), *marked]))
    alike = [content for content in contents if content not in unlike]
    texts = probe.texts(tokenizer)
    plain = [text for text in texts if not any(token in text for token in unlike)]
    return [
        *(Reading(text) for text in texts),
        *(Reading(text, add_special=False) for text in probe.with_tokens(contents)),
        *(Reading(text, False, False) for text in [*plain, *probe.with_tokens(alike)]),
    ]


def differences(
    tokenizer: Tokenizer, readings: Iterable[Reading], read: Read
) -> Iterator[Difference]:
    """The readings for which ``read`` gives other ids than ``tokenizer``."""
    before = tokenizer.encode_special_tokens
    try:
        for reading in readings:
            tokenizer.encode_special_tokens = not reading.parse_special
            expected = tokenizer.encode(reading.text, add_special_tokens=reading.add_special).ids
            found = read(reading)
            if found != expected:
                yield Difference(reading, expected, found)
    finally:
        tokenizer.encode_special_tokens = before


def summary(
    different: Sequence[Difference],
    compared: int,
    tokenizer: Tokenizer,
    name_of: Callable[[int], str],
    engine: str,
) -> list[str]:
    """One line, of the shortest text; none where all are alike. ``name_of``: the engine's tokens;
    ``compared``: readings in all."""
    if not different:
        return []
    first = min(different, key=lambda one: len(one.reading.text))
    return [
        f"{shown(first, tokenizer.id_to_token, name_of, engine)} "
        f"({len(different)} of {compared} readings differ)"
    ]


def shown(
    one: Difference,
    expected_of: Callable[[int], str | None],
    found_of: Callable[[int], str],
    engine: str,
) -> str:
    """The text and both readings from where they part; tokens by ``expected_of``, ``found_of``."""
    same = next(
        (at for at, (a, b) in enumerate(zip(one.expected, one.found, strict=False)) if a != b),
        min(len(one.expected), len(one.found)),
    )
    start = max(0, same - 1)
    how = "" if one.reading.parse_special else ", special tokens read as text"
    return (
        f"{_short(one.reading.text)}{how}: {engine} reads {_tokens(one.found, start, found_of)}, "
        f"tokenizer.json {_tokens(one.expected, start, expected_of)}"
    )


def _tokens(ids: Sequence[int], start: int, name_of: Callable[[int], str | None]) -> str:
    """``[… 'a' 64, 'b' 65 …]``."""
    end = start + _SHOWN
    some = [f"{name_of(token)!r} {token}" for token in ids[start:end]]
    before, after = "… " if start else "", " …" if len(ids) > end else ""
    return f"[{before}{', '.join(some)}{after}]"


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONG else text[:_LONG] + "…")
