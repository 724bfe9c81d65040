"""Which token begins, ends and pads a text, from the tokenizer's files.

Precedence as in llama.cpp's ``SpecialVocab`` (gguf-py/gguf/vocab.py): ids by the names in
tokenizer_config.json, then by number in config.json; what is added to a text by tokenizer.json's
post-processor, then by tokenizer_config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.system.json_file import load_json

if TYPE_CHECKING:
    import gguf

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass
class SpecialTokens:
    """``ids``: by role (``bos``). ``added``: whether every text gets the role's token."""

    ids: dict[str, int] = field(default_factory=dict)
    added: dict[str, bool] = field(default_factory=dict)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add ``tokenizer.ggml.*_token_id`` and ``add_*_token``."""
        for role, token in self.ids.items():
            if role != "cls":  # GGUF has no key for it
                getattr(writer, f"add_{role}_token_id")(token)
        for role, value in self.added.items():
            getattr(writer, f"add_add_{role}_token")(value)


def read_special_tokens(
    directory: Path,
    description: dict[str, Any],
    config: dict[str, Any],
    vocabulary: int | None,
) -> SpecialTokens:
    """``description``: tokenizer.json, empty where there is none; ``config``: config.json as it
    is on disk. Ids beyond ``vocabulary``, where it is given, are left out."""
    settings = load_json(directory / "tokenizer_config.json")
    names = {role: _content(settings.get(f"{role}_token")) for role in _ROLES}
    special = SpecialTokens()
    if description:
        names["bos"] = names["bos"] or names["cls"]
        names["eos"] = names["eos"] or names["sep"]
    _by_post_processor(description.get("post_processor") or {}, names, special.added)
    for role in _ROLES:
        flag = settings.get(f"add_{role}_token")
        if isinstance(flag, bool):
            special.added.setdefault(role, flag)

    added = {
        token["content"]: token["id"] for token in reversed(description.get("added_tokens", []))
    }
    text_config = config.get("text_config") or {}
    for candidates in (
        {role: added.get(name) for role, name in names.items()} if settings else {},
        {role: _first(f"{role}_token_id", config, text_config) for role in names},
    ):
        for role, token in candidates.items():
            if isinstance(token, int) and token >= 0 and (vocabulary is None or token < vocabulary):
                special.ids.setdefault(role, token)
    return special


def _content(token: Any) -> str | None:
    """The text of a token, which tokenizer_config.json gives as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _first(key: str, *configs: dict[str, Any]) -> Any:
    return next((config[key] for config in configs if config.get(key) is not None), None)


def _by_post_processor(
    processor: dict[str, Any], names: dict[str, str | None], added: dict[str, bool]
) -> None:
    """Read what a post-processor puts around a text into ``added``, and into ``names`` where
    tokenizer_config.json does not name the token that it puts there."""
    for step in processor.get("processors", [processor]):
        if step.get("type") == "ByteLevel":
            added.setdefault("bos", False)
            added.setdefault("eos", False)
        elif step.get("type") == "RobertaProcessing":
            added |= {"bos": True, "eos": True, "sep": True}
            names["cls"] = names["cls"] or step["cls"][0]
            names["sep"] = names["sep"] or step["sep"][0]
        elif step.get("type") == "TemplateProcessing":
            _by_template(step, names, added)


def _by_template(
    template: dict[str, Any], names: dict[str, str | None], added: dict[str, bool]
) -> None:
    single, pair = template.get("single", []), template.get("pair", [])
    first = _special(single[0]) if len(single) > 1 else None
    last = _special(single[-1]) if len(single) > 1 else None
    if first:
        names["bos"] = names["bos"] or first
        names["cls"] = names["cls"] or first
        added["bos"] = first in (names["bos"], names["cls"])
    if last:
        if names["eos"] != last:
            names["eot"] = names["eos"]  # a turn's end, where a text's end is another token
        names["eos"] = last
        added["eos"] = True
    if first and pair and _special(pair[0]) == first:
        pair = pair[1:]
    if last and pair and _special(pair[-1]) == last:
        pair = pair[:-1]
    between = [_special(step) for step in pair[1:-1]]
    if between and "Sequence" in pair[0] and "Sequence" in pair[-1]:
        ends = (names["sep"], names["eos"])
        added["sep"] = (between[0] in ends and not last) or (
            len(between) == 2 and between[1] in ends
        )
        if added["sep"]:
            names["sep"] = names["sep"] or names["eos"]


def _special(step: dict[str, Any]) -> str | None:
    name = step.get("SpecialToken", {}).get("id")
    return name if isinstance(name, str) else None
