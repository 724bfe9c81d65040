"""Whether what runs a variant reads text by the token ids of the source's tokenizer.json.

The reference is the file itself in the ``tokenizers`` library, not the class that
tokenizer_config.json names. Special tokens are compared read as such and read as plain text, where
the engine knows both, and whole texts with what is put before and after them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.formats.gguf.special_tokens import load_json
from quantkit.formats.gguf.vocabulary import SPACE
from quantkit.proof import probe
from quantkit.variant import IMATRIX

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from quantkit.formats.gguf.content import Content

_SHOWN = 6
"""Tokens of a reading that a message shows, from the one before the first that differs."""
_LONG = 80
"""Characters of a text that a message shows."""
_NAMED = 4
_COMPOSED = (
    "llama.cpp does not compose characters (NFC) as tokenizer.json asks, and reads decomposed text "
    "differently"
)
_MARKED_SPACES = f"llama.cpp reads runs of {SPACE}, by which it means spaces, differently"
_NO_FILE = (
    "there is no tokenizer.json, and transformers, which measures, does not read tokenizer.model "
    "quite as SentencePiece and llama.cpp do"
)
_ELSEWHERE = (
    "; `quantkit serve` has vLLM read tokenizer.json; elsewhere it does so once tokenizer_class in "
    "tokenizer_config.json is PreTrainedTokenizerFast"
)
_KNOWN_NORMALIZERS = ("NFC", "Prepend")


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


@dataclass(frozen=True)
class Comparison:
    """What came of a probe: ``differences`` change what a model is given, ``remarks`` are lines
    about what changes nothing in ordinary use."""

    compared: int
    differences: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def of_variant(source: Checkpoint, format: str, directory: Path) -> Comparison | None:
    """Of a variant whose files are all written; None where the source is a GGUF itself.

    Raise CheckpointError or EngineError where its tokenizer cannot be loaded.
    """
    if source.format == "gguf":
        return None
    if format == "gguf":
        files = sorted(file for file in directory.glob("*.gguf") if file.name != IMATRIX)
        return compare_gguf(source, files[0])
    return compare_auto(source, directory)


@lru_cache(maxsize=1)
def of_content(source: Checkpoint, content: Content) -> Comparison:
    """Of the GGUF files that would be made from ``content``, before any is."""
    from quantkit.formats.gguf.layout import lay_out

    with TemporaryDirectory(prefix="quantkit-") as work:
        path = Path(work) / "vocabulary.gguf"
        (part,) = lay_out(content.metadata(), [], None, ()).parts
        path.write_bytes(part.header)
        return compare_gguf(source, path)


def compare_gguf(source: Checkpoint, path: Path) -> Comparison:
    """llama.cpp with the vocabulary of the GGUF at ``path`` against the tokenizer of ``source``.

    Raise CheckpointError or EngineError where llama.cpp cannot load the vocabulary.
    """
    from quantkit.engines.llamacpp.vocabulary import Vocabulary

    tokenizer = _of(source)
    added = tokenizer.get_added_tokens_decoder()
    with Vocabulary(path) as vocabulary:

        def read(reading: Reading) -> list[int]:
            return vocabulary.encode(
                reading.text, add_special=reading.add_special, parse_special=reading.parse_special
            )

        control = {token: vocabulary.is_control(token) for token in added}
        hidden = [t.content for i, t in added.items() if control[i] and not t.special]
        shown = [t.content for i, t in added.items() if t.special and not control[i]]
        readings = _readings(tokenizer, [*hidden, *shown], vocabulary.marked)
        remarks = list(_unlike(hidden, shown))
        different = list(_differences(tokenizer, readings, read))
        for harmless, why in ((_only_composed, _COMPOSED), (_of_marked_spaces, _MARKED_SPACES)):
            some = [one for one in different if harmless(one, tokenizer, read)]
            different = [one for one in different if one not in some]
            if some:
                example = _shown(some[0], tokenizer.id_to_token, vocabulary.text, "llama.cpp")
                remarks.append(f"{why}: {example}")
        lines = _summary(different, len(readings), tokenizer, vocabulary.text, "llama.cpp")
    description = load_json(source.path / "tokenizer.json")
    if lines and not description:
        return Comparison(len(readings), [], [*remarks, *(f"{_NO_FILE}: {line}" for line in lines)])
    if lines:
        lines = ["; ".join([*lines, *_reasons(description)])]
    return Comparison(len(readings), lines, remarks)


def compare_auto(source: Checkpoint, directory: Path) -> Comparison:
    """What ``AutoTokenizer`` makes of the tokenizer that vLLM is given for ``directory``, against
    that of ``source``; what it makes of ``directory`` itself is only remarked.

    Raise CheckpointError where transformers cannot read it.
    """
    from quantkit.engines.vllm.tokenizer import as_written

    tokenizer = _of(source)
    readings = [reading for reading in _readings(tokenizer) if reading.parse_special]
    try:
        itself = _read_by_auto(tokenizer, readings, directory)
    except CheckpointError as error:
        itself = [f"vLLM cannot load the tokenizer by itself: {error}"]
    given = as_written(directory)
    differences = _read_by_auto(tokenizer, readings, given) if itself and given else itself
    remarks = [] if differences else [f"{line}{_ELSEWHERE}" for line in itself]
    return Comparison(len(readings), differences, remarks)


def _read_by_auto(tokenizer: Tokenizer, readings: list[Reading], directory: Path) -> list[str]:
    from quantkit.checkpoint import load_auto_tokenizer

    auto = load_auto_tokenizer(directory)

    def read(reading: Reading) -> list[int]:
        found: list[int] = auto(
            reading.text, add_special_tokens=reading.add_special, verbose=False
        ).input_ids
        return found

    different = list(_differences(tokenizer, readings, read))
    name = f"vLLM ({type(auto).__name__})"
    return _summary(different, len(readings), tokenizer, auto.convert_ids_to_tokens, name)


def _of(source: Checkpoint) -> Tokenizer:
    tokenizer: Tokenizer = source.tokenizer.backend_tokenizer
    return tokenizer


def _readings(
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


def _differences(
    tokenizer: Tokenizer, readings: Iterable[Reading], read: Read
) -> Iterator[Difference]:
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


def _only_composed(one: Difference, tokenizer: Tokenizer, read: Read) -> bool:
    """Whether the tokenizer composes characters, and the engine reads the composed text alike."""
    normalizer = tokenizer.normalizer
    composed = unicodedata.normalize("NFC", one.reading.text)
    return (
        normalizer is not None
        and composed != one.reading.text
        and normalizer.normalize_str("e\u0301") == "\u00e9"
        and read(replace(one.reading, text=composed)) == one.expected
    )


def _of_marked_spaces(one: Difference, tokenizer: Tokenizer, _: Read) -> bool:
    """Whether the text has the character that SentencePiece writes for a space."""
    return SPACE in one.reading.text and tokenizer.token_to_id(SPACE) is not None


def _unlike(hidden: Sequence[str], shown: Sequence[str]) -> Iterator[str]:
    if hidden:
        yield (
            f"llama.cpp takes {_some(hidden)} for control tokens, which it leaves out of answers; "
            "tokenizer.json does not mark them as special"
        )
    if shown:
        yield (
            f"llama.cpp takes {_some(shown)} for text, which it shows in answers; tokenizer.json "
            "marks them as special"
        )


def _summary(
    different: Sequence[Difference],
    compared: int,
    tokenizer: Tokenizer,
    name_of: Callable[[int], str],
    engine: str,
) -> list[str]:
    """One line, of the shortest text; none where all are alike."""
    if not different:
        return []
    first = min(different, key=lambda one: len(one.reading.text))
    return [
        f"{_shown(first, tokenizer.id_to_token, name_of, engine)} "
        f"({len(different)} of {compared} readings differ)"
    ]


def _shown(
    one: Difference,
    expected_of: Callable[[int], str | None],
    found_of: Callable[[int], str],
    engine: str,
) -> str:
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


def _some(contents: Sequence[str]) -> str:
    left = len(contents) - _NAMED
    return ", ".join(contents[:_NAMED]) + (f" and {left} more" if left > 0 else "")


def _reasons(description: dict[str, Any]) -> Iterator[str]:
    """What a tokenizer.json asks for that GGUF has no words for."""
    for key, what in (
        ("lstrip", "takes the spaces before it"),
        ("rstrip", "takes the spaces after it"),
        ("single_word", "is read as such only between other words"),
    ):
        tokens = [t["content"] for t in description.get("added_tokens", []) if t.get(key)]
        if tokens:
            yield f"llama.cpp cannot express that {_some(tokens)} {what} ({key})"
    top = description.get("normalizer") or {}
    steps = [step for step in top.get("normalizers", [top]) if step]
    others = [step["type"] for step in steps if not _is_known(step)]
    if others:
        yield f"llama.cpp cannot normalize text as tokenizer.json asks ({', '.join(others)})"
    splitter = description.get("pre_tokenizer") or {}
    if any(
        step.get("prepend_scheme") == "first" for step in splitter.get("pretokenizers", [splitter])
    ):
        yield (
            "llama.cpp cannot express a space before the text alone and none after special tokens "
            "(prepend_scheme first)"
        )


def _is_known(normalizer: dict[str, Any]) -> bool:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return normalizer["type"] in _KNOWN_NORMALIZERS or normalizer == spaces
