"""What a GGUF holds for chats: the templates, and the tokens at which an answer ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gguf import GGUFValueType as ValueType

from quantkit.errors import ConversionError
from quantkit.formats.gguf.fields import packed
from quantkit.models.chat_template import DEFAULT

_TEMPLATE = "tokenizer.chat_template"
_NAMES = "tokenizer.chat_templates"
_ENDS = ("eos", "eot", "eom")
"""Roles whose token ends an answer in llama.cpp."""

KNOWN_ENDS = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>"),
        *("<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>"),
        *("[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>"),
        *("<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),  # noqa: RUF001
    }
)
"""Texts of end tokens that llama.cpp recognizes by itself (llama-vocab.cpp)."""


def id_key(role: str) -> str:
    """``tokenizer.ggml.eos_token_id``."""
    return f"tokenizer.ggml.{role}_token_id"


def stored_name(name: str) -> str:
    """A template's name as llama.cpp's writer allows it in a key."""
    return re.sub("[^A-Za-z0-9]", "_", name)


def chat_fields(
    templates: Mapping[str, str],
    ends: Iterable[int],
    roles: Mapping[str, int],
    text_of: Callable[[int], str],
) -> dict[str, bytes]:
    """The keys, packed. ``roles``: ids by role (``eos``) that the file has already; ``text_of``: a
    token's text. Ends beyond the two keys that are left for them are not in the file."""
    fields: dict[str, bytes] = {}
    free = [role for role in _ENDS[1:] if role not in roles]
    taken = {roles[role] for role in _ENDS if role in roles}
    untold = [end for end in ends if end not in taken and text_of(end) not in KNOWN_ENDS]
    for role, end in zip(free, untold, strict=False):
        fields[id_key(role)] = packed(end, ValueType.UINT32)
    named = {stored_name(name): text for name, text in templates.items() if name != DEFAULT}
    if len(named) < len(templates.keys() - {DEFAULT}):
        raise ConversionError(
            f"gguf: chat templates {', '.join(sorted(templates))}: two have the same name in a "
            "GGUF, which keeps letters and digits only; rename one"
        )
    for name, text in named.items():
        fields[f"{_TEMPLATE}.{name}"] = packed(text, ValueType.STRING)
    if named:
        fields[_NAMES] = packed(list(named), ValueType.ARRAY, ValueType.STRING)
    if DEFAULT in templates:
        fields[_TEMPLATE] = packed(templates[DEFAULT], ValueType.STRING)
    return fields


def replaced(stored: Mapping[str, bytes], fields: Mapping[str, bytes]) -> dict[str, bytes]:
    """``stored`` with ``fields`` in the place of all that it says of templates."""
    kept = {
        key: fields.get(key, value)
        for key, value in stored.items()
        if key in fields or not key.startswith(_TEMPLATE)
    }
    return {**kept, **fields}


def roles_in(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the roles that end an answer, in a GGUF's metadata."""
    return {role: metadata[key] for role in _ENDS if (key := id_key(role)) in metadata}
