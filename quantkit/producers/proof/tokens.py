"""Whether what runs a variant reads text by the token ids of the source's tokenizer.json.

The reference is the file itself in the ``tokenizers`` library, not the class that
tokenizer_config.json names. Special tokens are compared read as such and read as plain text, where
the engine knows both, and whole texts with what is put before and after them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, ConversionError, EngineError
from quantkit.formats.gguf.vocabulary import SPACE
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.variant import Variant
from quantkit.producers.proof.readings import (
    Difference,
    Read,
    Reading,
    differences,
    readings,
    shown,
    summary,
)
from quantkit.system.json_file import load_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from quantkit.producers.gguf.content import Content

_NAMED = 4
_COMPOSED = (
    "llama.cpp does not compose characters (NFC) as tokenizer.json asks, and reads decomposed text "
    "differently"
)
_BY_LOOK = "llama.cpp takes some text for a control token by its look, wherever those are parsed"
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
class Comparison:
    """What came of a probe: ``differences`` change what a model is given, ``remarks`` are lines
    about what changes nothing in ordinary use."""

    compared: int
    differences: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def of_variant(source: Checkpoint, variant: Variant) -> Comparison | None:
    """The proof of a variant whose files are all written; None where the source is a GGUF itself.

    Raise CheckpointError or EngineError where its tokenizer cannot be loaded.
    """
    if source.format == "gguf":
        return None
    if variant.format == "gguf":
        return compare_gguf(source, variant.weights)
    return compare_auto(source, variant.path)


@lru_cache(maxsize=1)
def of_content(source: Checkpoint, content: Content) -> Comparison:
    """The proof of the GGUF files that would be made from ``content``, before any is made.

    Raise ConversionError where llama.cpp could not load their vocabulary.
    """
    from quantkit.producers.gguf.layout import lay_out

    with TemporaryDirectory(prefix="quantkit-") as work:
        path = Path(work) / "vocabulary.gguf"
        (part,) = lay_out(content.metadata(), [], None, ()).parts
        path.write_bytes(part.header)
        try:
            return compare_gguf(source, path)
        except (CheckpointError, EngineError) as error:
            raise ConversionError(
                f"gguf: {source.path}: llama.cpp cannot use the vocabulary made of it: {error}"
            ) from error


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
        unhidden = [t.content for i, t in added.items() if t.special and not control[i]]
        remarks = list(_unlike(hidden, unhidden))
        asked = readings(tokenizer, [*hidden, *unhidden], vocabulary.marked())
        by_look = vocabulary.marked_by_look()
        different = []
        harmless: dict[str, Difference] = {}
        for one in differences(tokenizer, asked, read):
            if _only_composed(one, tokenizer, read):
                harmless.setdefault(_COMPOSED, one)
            elif one.reading.parse_special and any(t in one.reading.text for t in by_look):
                harmless.setdefault(_BY_LOOK, one)
            elif _of_marked_spaces(one, tokenizer):
                harmless.setdefault(_MARKED_SPACES, one)
            else:
                different.append(one)
        names = (tokenizer.id_to_token, vocabulary.text)
        remarks += [f"{why}: {shown(one, *names, 'llama.cpp')}" for why, one in harmless.items()]
        lines = summary(different, len(asked), tokenizer, vocabulary.text, "llama.cpp")
    description = load_json(source.path / "tokenizer.json")
    if lines and not description:
        return Comparison(len(asked), [], [*remarks, *(f"{_NO_FILE}: {line}" for line in lines)])
    if lines:
        lines = ["; ".join([*lines, *_reasons(description)])]
    return Comparison(len(asked), lines, remarks)


def compare_auto(source: Checkpoint, directory: Path) -> Comparison:
    """What ``AutoTokenizer`` makes of the tokenizer that vLLM is given for ``directory``, against
    that of ``source``; what it makes of ``directory`` itself is only remarked.

    Raise CheckpointError where transformers cannot read it.
    """
    from quantkit.engines.vllm.tokenizer import as_written

    tokenizer = _of(source)
    asked = [reading for reading in readings(tokenizer) if reading.parse_special]
    try:
        itself = _read_by_auto(tokenizer, asked, directory)
    except CheckpointError as error:
        itself = [f"vLLM cannot load the tokenizer by itself: {error}"]
    given = as_written(directory) if itself else None
    lines = _read_by_auto(tokenizer, asked, given) if given else itself
    remarks = [] if lines else [f"{line}{_ELSEWHERE}" for line in itself]
    return Comparison(len(asked), lines, remarks)


def _read_by_auto(tokenizer: Tokenizer, asked: list[Reading], directory: Path) -> list[str]:
    from quantkit.models.tokenizer import load_auto_tokenizer

    auto = load_auto_tokenizer(directory)

    def read(reading: Reading) -> list[int]:
        found: list[int] = auto(
            reading.text, add_special_tokens=reading.add_special, verbose=False
        ).input_ids
        return found

    different = list(differences(tokenizer, asked, read))
    name = f"vLLM ({type(auto).__name__})"
    return summary(different, len(asked), tokenizer, auto.convert_ids_to_tokens, name)


def _of(source: Checkpoint) -> Tokenizer:
    tokenizer: Tokenizer = source.tokenizer.backend_tokenizer
    return tokenizer


def _only_composed(one: Difference, tokenizer: Tokenizer, read: Read) -> bool:
    """Whether the tokenizer composes characters, and the engine reads the composed text alike."""
    normalizer = tokenizer.normalizer
    composed = unicodedata.normalize("NFC", one.reading.text)
    return (
        normalizer is not None
        and composed != one.reading.text
        and "\u00e9\ufb01" in normalizer.normalize_str("e\u0301\ufb01")  # NFKC does more
        and read(replace(one.reading, text=composed)) == one.expected
    )


def _of_marked_spaces(one: Difference, tokenizer: Tokenizer) -> bool:
    """Whether the text has the character that SentencePiece writes for a space."""
    return SPACE in one.reading.text and tokenizer.token_to_id(SPACE) is not None


def _unlike(hidden: Sequence[str], unhidden: Sequence[str]) -> Iterator[str]:
    if hidden:
        yield (
            f"llama.cpp takes {_some(hidden)} for control tokens, which it leaves out of answers; "
            "tokenizer.json does not mark them as special"
        )
    if unhidden:
        yield (
            f"llama.cpp takes {_some(unhidden)} for text, which it shows in answers; "
            "tokenizer.json marks them as special"
        )


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
    schemes = [step.get("prepend_scheme") for step in splitter.get("pretokenizers", [splitter])]
    if "always" in schemes or "first" in schemes:
        yield (
            "llama.cpp puts a space before a text that begins with one, tokenizer.json does not "
            "(Metaspace)"
        )
    if "first" in schemes:
        yield (
            "llama.cpp cannot express a space before the text alone and none after special tokens "
            "(prepend_scheme first)"
        )


def _is_known(normalizer: dict[str, Any]) -> bool:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return normalizer["type"] in _KNOWN_NORMALIZERS or normalizer == spaces
