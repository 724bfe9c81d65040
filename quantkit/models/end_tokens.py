"""At which tokens a model's answers end: one set, for what is measured and for what is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantkit.models.chat_template import DEFAULT, WITH_TOOLS, chat_templates, render, token_names
from quantkit.system.json_file import load_json

_ANSWER = "Forty-two."
"""An answer in a chat that is rendered to see what follows it."""


def end_ids(directory: Path, eos: int | None = None) -> tuple[int, ...]:
    """Ids at which an answer ends, each once: what the chat template writes after an answer, what
    generation_config.json and config.json call ``eos_token_id``, and the tokenizer's EOS, which
    ``eos`` is where its id is known.

    Raise CheckpointError for files that are damaged.
    """
    added, names = dict(_added_tokens(directory)), token_names(directory)
    config = load_json(directory / "config.json")
    found: list[Any] = [_turn_end(directory, added, names)]
    for said in (
        load_json(directory / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        _object(config.get("text_config")).get("eos_token_id"),
    ):
        found += said if isinstance(said, list) else [said]
    found += [eos, added.get(names.get("eos_token", ""))]
    return tuple(dict.fromkeys(id_ for id_ in found if type(id_) is int and id_ >= 0))


def _turn_end(directory: Path, added: dict[str, int], names: dict[str, str]) -> int | None:
    """The added token that the chat template writes after an answer, be that the last message or
    not; None where there is no template, or where no such token follows."""
    templates = chat_templates(directory)
    template = templates.get(DEFAULT, templates.get(WITH_TOOLS))
    if template is None:
        return None
    ends = set()
    for messages in (2, 3):
        after = _after_answer(template, messages, names)
        ends.add(max((text for text in added if after.startswith(text)), key=len, default=""))
    return added.get(ends.pop()) if len(ends) == 1 else None


def _after_answer(template: str, count: int, names: dict[str, str]) -> str:
    """What a template writes after an answer in a chat of ``count`` messages, without the space
    around it; empty where the answer cannot be found."""
    said = [("user", "What?"), ("assistant", _ANSWER), ("user", "Why?")][:count]
    plain = [{"role": role, "content": text} for role, text in said]
    parts = [{"role": r, "content": [{"type": "text", "text": text}]} for r, text in said]
    for messages in (plain, parts):
        try:
            chat = render(template, messages, **names)
        except Exception:  # whatever a template raises for such a chat: then nothing is known
            continue
        if chat.count(_ANSWER) == 1:
            return chat.partition(_ANSWER)[2].strip()
    return ""


def _added_tokens(directory: Path) -> Iterator[tuple[str, int]]:
    """Text and id of the tokens that are added to the vocabulary, special ones among them."""
    yield from load_json(directory / "added_tokens.json").items()
    settings = load_json(directory / "tokenizer_config.json")
    for id_, token in _object(settings.get("added_tokens_decoder")).items():
        yield token["content"], int(id_)
    for token in load_json(directory / "tokenizer.json").get("added_tokens") or []:
        yield token["content"], token["id"]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
