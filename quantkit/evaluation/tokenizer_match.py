"""Whether two models mean the same text by the same token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import CheckpointError, ConversionError, EvaluationError
from quantkit.formats import format_of
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.hf_config import count
from quantkit.models.variant import Model, tokenizer_directory

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FILES = ("tokenizer.json", "tokenizer.model")
_SAMPLE = "It's 3.14159 – naïve façade, 北京 и Москва;\n\tdef f(x):\n        return x**2  # 😀 ﬁn"
"""Text on which tokenizers that look alike differ."""


def require_same_tokens(first: Model, other: Model) -> None:
    """Raise EvaluationError where two models would read the same ids as different text.

    Files that differ by a byte may still be the same tokenizer, saved by another version.
    """
    for difference in _differences(first, other):
        raise EvaluationError(
            f"{other.path}: {difference} differs from that of {first.path}; models with different "
            "tokenizers cannot be measured on the same tokens"
        )


def _differences(first: Model, other: Model) -> Iterator[str]:
    one, two = (tokenizer_directory(model) for model in (first, other))
    inside = format_of(other).vocabulary(other)
    if inside is not None and isinstance(first, Checkpoint):
        yield from _inside(first, inside)
        return
    for name in _FILES:
        files = [directory / name for directory in (one, two)]
        if not all(file.is_file() for file in files):
            continue
        if files[0].read_bytes() == files[1].read_bytes():
            return
        if name == "tokenizer.json":
            if not _alike(_read(files[0]), _read(files[1])):
                yield f"its {name}"
            return
        yield f"its {name}"


def _alike(one: Tokenizer, other: Tokenizer) -> bool:
    samples = [
        tokenizer.encode(_SAMPLE, add_special_tokens=False).ids for tokenizer in (one, other)
    ]
    return one.get_vocab() == other.get_vocab() and samples[0] == samples[1]


def _read(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # of a class of its own, which is Exception
        raise CheckpointError(f"{path}: unreadable tokenizer: {error}") from error
    return tokenizer


def _inside(source: Checkpoint, stored: list[str]) -> Iterator[str]:
    """The vocabulary inside the file against the one that quantkit would write into it."""
    from quantkit.producers.gguf.tokenizer import read_tokenizer

    try:
        expected = read_tokenizer(source, count(source.path, "vocab_size")).tokens
    except ConversionError:
        return  # llama.cpp's own converter knows it, quantkit does not
    # Embeddings without a token are padded in several ways.
    for token, text in zip(expected, stored, strict=False):
        if token.text.decode(errors="replace") != text:
            yield f"the vocabulary inside ({token.text.decode(errors='replace')!r}, here {text!r})"
            return
