"""What vLLM does not find in a model's files by itself: further end tokens, and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.models.chat_template import DEFAULT, chat_templates, tokenizer_templates
from quantkit.models.end_tokens import end_ids
from quantkit.models.variant import Model
from quantkit.system.files import sha256_json, write_json, write_text
from quantkit.system.home import home
from quantkit.system.json_file import load_json


def told(model: Model) -> list[str]:
    """Arguments of vLLM; they name files, which are written into quantkit's home.

    By itself vLLM ends answers at the tokenizer's EOS and where generation_config.json says, or
    config.json if that is not there, and renders chats by the tokenizer's template.
    """
    arguments = []
    generation = load_json(model.path / "generation_config.json")
    named = (generation or load_json(model.path / "config.json")).get("eos_token_id")
    ends = end_ids(model.path)
    if not set(ends) <= set(named if isinstance(named, list) else [named]):
        content = generation | {"eos_token_id": list(ends)}
        directory = _directory(content)
        write_json(directory / "generation_config.json", content)
        arguments += ["--generation-config", str(directory)]
    template = chat_templates(model.path).get(DEFAULT)
    if template is not None and not tokenizer_templates(model.path):
        file = _directory(template) / "chat_template.jinja"
        write_text(file, template)
        arguments += ["--chat-template", str(file)]
    return arguments


def _directory(content: Any) -> Path:
    found = home() / "vllm-settings" / sha256_json(content)[:16]
    found.mkdir(parents=True, exist_ok=True)
    return found
