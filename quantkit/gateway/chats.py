"""Whether an engine can be asked by messages: llama.cpp answers without a chat template too, in a
form (ChatML) that the model was never trained on."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.formats import format_of
from quantkit.models import chat_template
from quantkit.models.engine_config import Option
from quantkit.models.variant import Model

_GIVEN = frozenset({"chat-template", "chat-template-file"})
"""Arguments of engines that take the place of the model's own template."""


def renders_chats(model: Model, options: Mapping[str, Option]) -> bool:
    """Whether the model has a chat template, or its engine is given one."""
    given = {name.replace("_", "-") for name in options}
    return bool(given & _GIVEN) or chat_template.renders_chats(
        format_of(model).chat_templates(model)
    )
