"""The entries of a GGUF's vocabulary, whatever kind of tokenizer they come from."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from quantkit.errors import ConversionError

SPACE = "\u2581"
"""How SentencePiece writes a space."""

ADDED_SCORE = -1000.0


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``, which SentencePiece numbers alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Token(NamedTuple):
    """One entry of the vocabulary; its id is its position."""

    text: bytes
    score: float
    type: TokenType


def unused(vocabulary: int, score: float) -> list[Token]:
    """Embeddings that no token uses keep a name of their own."""
    return [Token(f"[PAD{token}]".encode(), score, TokenType.UNUSED) for token in range(vocabulary)]


def added(text: str, special: bool | None, score: float) -> Token:
    """A token added to the vocabulary: control, or text that is always one token."""
    if special or _looks_special(text):
        return Token(text.encode(), score, TokenType.CONTROL)
    return Token(text.replace(SPACE, " ").encode(), score, TokenType.USER_DEFINED)


def within(
    items: Iterable[tuple[str, int]], vocabulary: int, where: Path
) -> Iterable[tuple[str, int]]:
    """The tokens and their ids; raise ConversionError for one that has no row."""
    for text, token in items:
        if token >= vocabulary:
            raise ConversionError(
                f"gguf: {where}: token {text!r} has id {token}, but the embedding has "
                f"{vocabulary} rows (config.json: vocab_size)"
            )
        yield text, token


def _looks_special(text: str) -> bool:
    """Some models do not mark their control tokens as such."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))  # noqa: RUF001  DeepSeek's
        or (text.startswith("<unused") and text.endswith(">"))
    )
