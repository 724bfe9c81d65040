"""How llama-server is started so that it renders chats as transformers does.

By itself it renders with variables that transformers does not have (``enable_thinking``, today's
``date_string``) and without others (``unk_token``; ``tools`` where there are none), makes a system
message a part of the first question where the template has no place for it, goes on with an
answer that is the last message, and takes ChatML for a model that has no template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from quantkit.models.chat_template import (
    DEFAULT,
    WITH_TOOLS,
    render,
    templates_in_gguf,
    token_names,
)
from quantkit.models.variant import Model

_NO_TEMPLATE = "this model has no chat template; use /v1/completions"
_ONLY_WITH_TOOLS = "this model has a chat template for requests with tools only"

_GUARD = "quantkit_serves"
"""A variable that is not there yet when llama-server tries a template before it starts."""
_SET = ("enable_thinking", "date_string", "datetime")
"""Variables that llama.cpp sets itself where a client does not."""
_MISSING = ("tools", "documents")
"""Variables that are always there in transformers."""
_KEPT = {"preserve_thinking": True, "clear_thinking": False, "truncate_history_thinking": False,
         "drop_thinking": False}  # fmt: skip
"""What llama.cpp sets by its own ``preserve_reasoning``, unless that is neither true nor false."""
_KNOWN_TOKENS = ("bos_token", "eos_token")
"""Names that llama.cpp itself gives to templates; of others it knows nothing."""
_PREAMBLE = "".join(
    (
        *(f"{{% if {x} is none %}}{{% set {x} = quantkit_none %}}{{% endif %}}" for x in _SET),
        *(f"{{% if {x} is not defined %}}{{% set {x} = none %}}{{% endif %}}" for x in _MISSING),
        # A template that reads the system message handles it in its own way.
        "{% if messages[0].content is none %}{% endif %}",
        "\n",
    )
)
_CHAT = (
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "That.", "reasoning_content": "Hm."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So.", "reasoning_content": "Well."},
    {"role": "user", "content": "How?"},
)
_SYSTEM = {"role": "system", "content": "Be brief."}


@dataclass(frozen=True)
class ChatSettings:
    """Arguments of llama-server, and variables of its environment."""

    arguments: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


def chat_settings(model: Model, metadata: Mapping[str, Any]) -> ChatSettings:
    """What makes llama-server render a GGUF's chats as transformers would, and refuse those of a
    model that has no template; ``metadata`` is the file's."""
    # An assistant's last message is one like the others, as in transformers and vLLM.
    arguments = ["--no-prefill-assistant"]
    names = token_names(model.path) if model.path.is_dir() else {}
    adapted = _adapted(templates_in_gguf(metadata), names)
    if adapted is None:
        return ChatSettings(tuple(arguments))
    variables = {_GUARD: True, "preserve_reasoning": None, **dict.fromkeys(_SET)}
    variables |= {key: text for key, text in names.items() if key not in _KNOWN_TOKENS}
    arguments += ["--chat-template-kwargs", json.dumps(variables)]
    return ChatSettings(tuple(arguments), {"LLAMA_ARG_CHAT_TEMPLATE": adapted})


def _adapted(templates: Mapping[str, str], names: Mapping[str, str]) -> str | None:
    """A template for llama.cpp to render in the place of the file's; None where those will do."""
    default, with_tools = templates.get(DEFAULT), templates.get(WITH_TOOLS)
    if default is None:
        default = _refusing(_NO_TEMPLATE if with_tools is None else _ONLY_WITH_TOOLS)
    elif not any(_differs(text, names) for text in (default, with_tools) if text is not None):
        return None
    if with_tools is None:
        return _PREAMBLE + default
    # llama.cpp leaves the other templates of a file aside where it is given one.
    with_tools, default = (text.removesuffix("\n") for text in (with_tools, default))
    cases = f"{{% if tools %}}\n{with_tools}{{% else %}}\n{default}{{% endif %}}"
    return _PREAMBLE + cases


def _refusing(reason: str) -> str:
    return f'{{% if {_GUARD} is defined %}}{{{{ raise_exception("{reason}") }}}}{{% endif %}}'


def _differs(template: str, names: Mapping[str, str]) -> bool:
    """Whether llama.cpp by itself would render another text."""
    from jinja2 import Undefined

    now = datetime.now()
    theirs: dict[str, Any] = {name: names[name] for name in _KNOWN_TOKENS if name in names}
    theirs |= dict.fromkeys(_MISSING, Undefined()) | _KEPT
    theirs |= {"date_string": f"{now:%d %b %Y}", "datetime": f"{now:%b %d %Y}"}
    for chat in (_CHAT[:1], _CHAT, (_SYSTEM, *_CHAT)):
        wanted = _rendered(template, chat, names)
        # Which it takes depends on what it makes of the template.
        for thinking in (False, True):
            if _rendered(template, chat, theirs | {"enable_thinking": thinking}) != wanted:
                return True
    return _SYSTEM["content"] not in wanted


def _rendered(template: str, chat: Sequence[dict[str, str]], variables: Mapping[str, Any]) -> str:
    try:
        return render(template, chat, add_generation_prompt=True, **variables)
    except Exception as error:  # whatever a template raises for such a chat
        return type(error).__name__
