"""The chat template of a model: which of its files counts, and how it is rendered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from quantkit.errors import CheckpointError
from quantkit.system.json_file import load_json

if TYPE_CHECKING:
    from jinja2 import Environment, Template

NAMED = "additional_chat_templates"
"""The directory beside ``chat_template.jinja`` that holds the templates of other names."""
DEFAULT, WITH_TOOLS = "default", "tool_use"
"""Names that mean something: the second takes the place of the first where tools are given."""

_KEY = "tokenizer.chat_template"


def chat_templates(directory: Path) -> dict[str, str]:
    """By name, the templates by which transformers renders chats; empty where there are none.

    chat_template.json, which transformers reads only for the processors of multimodal models,
    counts where the tokenizer has none. Raise CheckpointError for what is damaged.
    """
    return tokenizer_templates(directory) or _of_settings(directory / "chat_template.json")


def tokenizer_templates(directory: Path) -> dict[str, str]:
    """Those of transformers' tokenizer. Files of their own (``chat_template.jinja``,
    ``additional_chat_templates/``) take the place of all that tokenizer_config.json says."""
    files = {path.stem: path for path in sorted((directory / NAMED).glob("*.jinja"))}
    own = directory / "chat_template.jinja"
    if own.is_file():
        files = {DEFAULT: own} | files
    if files:
        return {name: _text(path) for name, path in files.items()}
    return _of_settings(directory / "tokenizer_config.json")


def templates_in_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Likewise of a GGUF's metadata."""
    named = {
        key.removeprefix(f"{_KEY}."): text
        for key, text in metadata.items()
        if key.startswith(f"{_KEY}.") and isinstance(text, str)
    }
    default = metadata.get(_KEY)
    return ({DEFAULT: default} if isinstance(default, str) else {}) | named


def renders_chats(templates: Mapping[str, str]) -> bool:
    """Whether a model with these can be asked by messages; else it takes only plain prompts."""
    return not {DEFAULT, WITH_TOOLS}.isdisjoint(templates)


def token_names(directory: Path) -> dict[str, str]:
    """What a template reads as ``bos_token`` and the like: tokenizer_config.json's ``*_token``."""
    settings = load_json(directory / "tokenizer_config.json")
    found = {}
    for key, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def render(template: str, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
    """The text of a chat as transformers' ``apply_chat_template`` makes it, in a sandbox.

    Raise jinja2's TemplateError, or whatever a template's expressions raise.
    """
    given = {"tools": None, "documents": None, "add_generation_prompt": False} | variables
    return str(_compiled(template).render(messages=messages, **given))


def check_syntax(template: str) -> None:
    """Raise jinja2's TemplateError where transformers could not read it."""
    _compiled(template)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """As ``transformers.utils.chat_template_utils`` sets it up; importing that takes seconds."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant says; nothing else comes of it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    found.filters["tojson"] = tojson
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error}") from error


def _of_settings(path: Path) -> dict[str, str]:
    """What a JSON file has under ``chat_template``: one text, or several with names."""
    found = load_json(path).get("chat_template")
    if isinstance(found, str):
        return {DEFAULT: found}
    try:
        named = dict(found.items() if isinstance(found, dict) else _pairs(found or []))
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: chat_template: expected a text, or a list of {{name, template}}"
        ) from error
    return {name: text for name, text in named.items() if isinstance(text, str)}


def _pairs(entries: Sequence[dict[str, str]]) -> Iterator[tuple[str, str]]:
    for entry in entries:
        yield entry["name"], entry["template"]
