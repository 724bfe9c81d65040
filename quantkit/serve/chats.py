"""Whether an engine can be asked by messages: llama.cpp answers without a chat template too, in a
form (ChatML) that the model was never trained on."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.formats.gguf.special_tokens import load_json
from quantkit.serve.arguments import Argument
from quantkit.variant import Model

_GIVEN = frozenset({"chat-template", "chat-template-file"})
"""Arguments of engines that take the place of the model's own template."""


def renders_chats(model: Model, arguments: Mapping[str, Argument]) -> bool:
    """Whether the model has a chat template, or its engine is given one."""
    given = {name.replace("_", "-") for name in arguments}
    return bool(given & _GIVEN) or has_chat_template(model)


def has_chat_template(model: Model) -> bool:
    """Whether there is one in the GGUF, or among a checkpoint's files."""
    if model.format == "gguf":
        from quantkit.formats.gguf.model_file import ModelFile

        return "tokenizer.chat_template" in ModelFile.open(model.weights).metadata
    directory = model.path
    return (
        (directory / "chat_template.jinja").is_file()
        or any((directory / "additional_chat_templates").glob("*.jinja"))
        or bool(load_json(directory / "tokenizer_config.json").get("chat_template"))
        or bool(load_json(directory / "chat_template.json").get("chat_template"))
    )
