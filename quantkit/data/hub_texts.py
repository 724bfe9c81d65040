"""Texts from the Hugging Face hub: of each data set as much as is needed, without its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantkit.data.text import Text, conversation_of, of_conversations
from quantkit.errors import RecipeError, first_line

_CHARACTERS = 2_000_000
"""Characters of a calibration text: some 500,000 tokens."""
_DOCUMENT = 20_000
"""Characters of one document at most, so that none has most of the text."""
_PERMISSIVE = frozenset({
    "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "isc", "mit", "unlicense",
})  # fmt: skip
_CHAT = ("messages",)
_LANGUAGES = ("de", "fr", "es", "pt", "it", "ru", "zh", "ja", "ko", "ar", "hi", "tr")


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub, and what of it is read."""

    id: str
    configurations: tuple[str | None, ...]
    split: str
    columns: tuple[str, ...]
    """Columns of a row, joined by line breaks; ``messages`` is a conversation."""
    licences: frozenset[str] = frozenset()
    """Rows with other licences than these are left out; empty: all may be used."""


CALIBRATION = {
    "web": DataSet("allenai/c4", ("en",), "train", ("text",)),
    "code": DataSet(
        "codeparrot/codeparrot-clean-valid", (None,), "train", ("content",), _PERMISSIVE
    ),
    "chat": DataSet("HuggingFaceH4/ultrachat_200k", (None,), "train_sft", ("messages",)),
    "math": DataSet("openai/gsm8k", ("main",), "train", ("question", "answer")),
    "languages": DataSet(
        "wikimedia/wikipedia",
        tuple(f"20231101.{language}" for language in _LANGUAGES),
        "train",
        ("text",),
    ),
    "encyclopedia": DataSet("wikimedia/wikipedia", ("20231101.en",), "train", ("text",)),
}


def calibration(kind: str) -> Text:
    """The first documents of the kind's data set, the same number of characters of each language.

    Streamed: of a data set of terabytes a few megabytes are read. Raise RecipeError with what the
    hub said.
    """
    name, data = f"hub:{kind}", CALIBRATION[kind]
    try:
        from huggingface_hub import dataset_info

        revision = dataset_info(data.id).sha
        documents = [
            document
            for configuration in data.configurations
            for document in _first(data, configuration, revision)
        ]
    except Exception as error:  # network, hub and cache: datasets has no common class for them
        raise _refused(name, error, "calibration.text: mix needs no network") from error
    what = " ".join([data.id, *filter(None, data.configurations), data.split])
    if data.columns == _CHAT:
        chats = tuple(conversation_of(messages, name) for messages in documents)
        return of_conversations(Text(what, revision, ""), chats)
    return Text(what, revision, "\n\n".join(documents))


def _first(data: DataSet, configuration: str | None, revision: str | None) -> Iterator[Any]:
    """Documents until there are enough: texts, or lists of messages."""
    from datasets import load_dataset

    left = _CHARACTERS // len(data.configurations)
    rows = load_dataset(data.id, configuration, split=data.split, revision=revision, streaming=True)
    for row in rows:
        if left <= 0:
            return
        if data.licences and row["license"] not in data.licences:
            continue
        if data.columns == _CHAT:
            document = row["messages"]
            left -= sum(len(message["content"]) for message in document)
        else:
            document = "\n".join(row[column] for column in data.columns)[:_DOCUMENT]
            left -= len(document)
        yield document


def wikitext_2(split: str) -> Text:
    """WikiText-2 raw, put together again as the original file."""
    from datasets import load_dataset

    name = "Salesforce/wikitext"
    try:
        rows = load_dataset(name, "wikitext-2-raw-v1", split=split)
    except Exception as error:  # as above
        local = "give the path of a local wiki.test.raw instead"
        raise _refused(f"wikitext-2:{split}", error, local) from error
    # The hub's rows are the file's lines, its blank lines (" \n") as empty strings.
    text = "".join(row or " \n" for row in rows["text"])
    return Text(f"{name} wikitext-2-raw-v1 {split}", str(rows.version), text)


def _refused(name: str, error: Exception, instead: str) -> RecipeError:
    return RecipeError(f"text {name!r}: the hub said: {first_line(error)}; {instead}")
