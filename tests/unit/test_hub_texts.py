"""Texts from the hub, with its data sets played by lists and by local files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest

from quantkit.data import hub_texts
from quantkit.data.hub_texts import CALIBRATION
from quantkit.data.mix import MIXES, Mix, load_calibration
from quantkit.data.texts import load_text
from quantkit.errors import RecipeError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Answers for each data set and configuration with endless rows, and counts them."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, str]] = []
        self.read = 0

    def load_dataset(
        self, id_: str, configuration: str | None, *, split: str, revision: str, streaming: bool
    ) -> Iterator[dict[str, Any]]:
        assert (revision, streaming) == (COMMIT, True)
        self.asked.append((id_, configuration, split))
        return self._rows(configuration)

    def _rows(self, configuration: str | None) -> Iterator[dict[str, Any]]:
        for number in range(10_000_000):
            self.read += 1
            words = f"{configuration} {number} "
            yield {
                "text": words * 10,
                "content": words * 1000,
                "question": f"How much is {number} and 1?",
                "answer": f"#### {number + 1}",
                "license": "gpl-3.0" if number % 2 else "mit",
                "messages": [
                    {"role": "user", "content": f"{number}?"},
                    {"role": "assistant", "content": f"{number}!"},
                ],
            }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(datasets, "load_dataset", found.load_dataset)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda _: SimpleNamespace(sha=COMMIT))
    monkeypatch.setattr(hub_texts, "_CHARACTERS", 24_000)
    return found


def test_the_hubs_mix_is_read_as_far_as_needed(hub: Hub) -> None:
    mix = load_calibration("mix:hub")
    assert isinstance(mix, Mix)
    assert [part.kind for part in mix.parts] == list(MIXES["mix:hub"])
    assert {part.text.revision for part in mix.parts} == {COMMIT}
    # The last document of each goes over the limit; nothing after it is read.
    for part in mix.parts:
        length = sum(map(len, part.text.text.split("\n\n")))
        assert 24_000 <= length < 24_000 + 12 * 20_000, part.kind
    assert hub.read < 10_000
    assert [part.text.dataset for part in mix.parts if part.kind in ("web", "code", "chat")] == [
        "allenai/c4 en train",
        "codeparrot/codeparrot-clean-valid train",
        "HuggingFaceH4/ultrachat_200k train_sft",
    ]


def test_each_language_gives_as_much(hub: Hub) -> None:
    text = load_text("hub:languages")
    languages = [name for _, name, _ in hub.asked if name]
    assert len(languages) == 12
    assert languages[0] == "20231101.de"
    for language in languages:
        documents = [one for one in text.text.split("\n\n") if one.startswith(language)]
        assert 2_000 <= sum(map(len, documents)) < 2_500


def test_code_is_of_permissive_licences_and_no_document_has_most(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_texts, "_DOCUMENT", 5000)
    documents = load_text("hub:code").text.split("\n\n")
    assert [document.split()[1] for document in documents] == ["0", "2", "4", "6", "8"]
    # "None 0 " a thousand times, cut at what one document may have.
    assert [len(document) for document in documents] == [5000, 5000, 5000, 5000, 5000]


def test_rows_are_joined_by_their_columns(hub: Hub) -> None:
    text = load_text("hub:math").text
    assert text.startswith("How much is 0 and 1?\n#### 1\n\nHow much is 1 and 1?\n#### 2\n\n")
    assert hub.asked == [("openai/gsm8k", "main", "train")]


def test_conversations_stay_conversations(hub: Hub) -> None:
    text = load_text("hub:chat")
    assert text.conversations[1] == (
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "1!"},
    )
    assert text.text.startswith("0?\n\n0!\n\n1?\n\n1!")


def test_a_local_directory_is_read_as_the_hub_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real ``datasets``, streaming from a file."""
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = replace(CALIBRATION["math"], id=str(tmp_path), configurations=(None,))
    monkeypatch.setitem(hub_texts.CALIBRATION, "math", local)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda _: SimpleNamespace(sha=None))
    assert load_text("hub:math").text == "\n\n".join(f"q{n}\na{n}" for n in range(5))


def test_what_the_hub_says_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise ConnectionError("no route to host\nand a long trace")

    monkeypatch.setattr(huggingface_hub, "dataset_info", refuse)
    with pytest.raises(
        RecipeError,
        match=r"^text 'hub:web': the hub said: no route to host; calibration\.text: mix needs no",
    ):
        load_calibration("mix:hub")
