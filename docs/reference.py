"""Write docs/cli.md from the commands and docs/recipe.md from the models that read a recipe.

``python -m docs.reference``; tests/unit/test_reference_pages.py holds the pages to it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
from cloup import OptionGroupMixin
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from quantkit.benchmark.section import BenchSection
from quantkit.cli.main import cli
from quantkit.data.section import CalibrationSection
from quantkit.evaluation.section import EvaluateSection
from quantkit.ledger.load import Slo
from quantkit.producers.compressed_tensors_spec import SchemeOptions
from quantkit.producers.gguf.options import Options
from quantkit.producers.linear_options import LinearOptions
from quantkit.runs.recipe import Recipe
from quantkit.runs.source import AdaptedSource

COMMAND = "python -m docs.reference"
_HERE = Path(__file__).parent
_WRITTEN = f"<!-- Written by `{COMMAND}`: change the code, not this page. -->\n\n"


def pages() -> dict[str, str]:
    """Each page that is written here, by its file's name."""
    return {"cli.md": _WRITTEN + _cli_page(), "recipe.md": _WRITTEN + _recipe_page()}


def docstrings(model: type) -> dict[str, str]:
    """What stands under each field of a class, as one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).replace("``", "`").split())
    return found


# The command line


def _cli_page() -> str:
    head = (
        "# Command line\n\n"
        "Every command takes `--help`. `quantkit --debug COMMAND` prints details of the work, and "
        "the traceback of an error. Results are on stdout, everything else on stderr. Exit codes: "
        "0 all is well; 1 a variant failed, does not verify, or none meets the limits; 2 the input "
        "is wrong; 130 interrupted.\n"
    )
    return "\n".join([head, *_commands(cli, "quantkit")])


def _commands(group: click.Group, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        else:
            yield _command(command, f"{path} {name}")


def _command(command: click.Command, path: str) -> str:
    assert isinstance(command, OptionGroupMixin)
    context = click.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    lines = [f"## {path}\n", f"```\n{usage}\n```\n", *_text(command.help or "")]
    rows = [
        [f"`{one.human_readable_name}`", _cell(one.help or ""), ""]  # type: ignore[attr-defined]
        for one in command.arguments
    ]
    for group in command.option_groups:
        rows += [[f"**{group.title}**", "", ""], *map(_option, group.options)]
    return "\n".join([*lines, *_table(["", "what it is", "default"], rows)])


def _text(help_: str) -> Iterator[str]:
    """The paragraphs of a command's docstring; examples as code."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(help_).split("\n\n")]
    examples = [part.removeprefix("Example: ") for part in paragraphs if part[:9] == "Example: "]
    for paragraph in paragraphs[: len(paragraphs) - len(examples)]:
        yield f"{paragraph}\n"
    yield "\n".join(["```", *examples, "```\n"])


def _option(option: click.Option) -> list[str]:
    form = option.metavar or ""
    if isinstance(option.type, click.Choice):
        form = "|".join(option.type.choices)
    flag = f"{option.opts[0]} {form}".rstrip()
    if option.required:
        default = "required"
    elif isinstance(option.show_default, str):
        default = option.show_default
    else:
        given = isinstance(option.default, str | int | float) and not option.is_flag
        default = f"`{option.default}`" if given else ""
    help_ = option.help or ""
    if option.show_envvar:
        help_ += f" Also the environment variable `{option.envvar}`."
    return [f"`{_cell(flag)}`", _cell(help_), _cell(default)]


# The recipe


def _recipe_page() -> str:
    made = [
        ["`spec`", "text", "", "Format and scheme, such as `gguf:Q4_K_M`, `gptq:w4g128`."],
        ["`path`", "text", "", "In the place of `spec`: a variant that somebody else made; a "
         "directory, a GGUF file or `org/name@revision`. Takes `name` and nothing else."],
        ["`name`", "text", "from the spec", "The variant's name in results and its directory."],
        ["`producer`", "text", "`native`", "Package that makes the weights: GPTQ or AWQ by "
         "`auto-round`, `autoawq`, `auto-gptq`, compressed-tensors by `llm-compressor`; its own "
         "options stand beside it."],
    ]  # fmt: skip
    parts = [
        "# Recipes\n\nA recipe is a YAML file that says what `quantkit run` makes and measures. "
        "Only `name`, `source` and `convert` are required. `--set KEY=VALUE` gives another value "
        "to any key, such as `--set evaluate.windows=8`. The shipped ones, `quickstart` and "
        "`wikitext-mmlu`, are good beginnings.\n",
        *_section("The file", Recipe),
        *_section("`source` with an adapter", AdaptedSource),
        "## An entry of `convert`\n\nEither a spec alone, such as `gguf:Q4_K_M`, or keys:\n",
        *_table(["key", "value", "default", "what it is"], made),
        *_section("Of a GGUF entry", Options),
        *_section("Of a GPTQ, AWQ or compressed-tensors entry", LinearOptions),
        *_section("Of a compressed-tensors entry", SchemeOptions),
        *_section("`calibration`", CalibrationSection),
        *_section("`evaluate`", EvaluateSection),
        *_section("`bench`", BenchSection),
        *_section("`bench.slo`", Slo),
    ]
    return "\n".join(parts)


def _section(title: str, model: type) -> list[str]:
    said = docstrings(model)
    rows = [
        [f"`{key}`", _cell(value), _cell(default), _cell(said.get(key, ""))]
        for key, value, default in _fields(model)
    ]
    return [f"## {title}\n", *_table(["key", "value", "default", "what it is"], rows)]


def _fields(model: type) -> Iterator[tuple[str, str, str]]:
    """Key, kind of value, default."""
    if issubclass(model, BaseModel):
        for key, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True)
            limits = [_limit(one) for one in field.metadata]
            kind = ", ".join(filter(None, [_kind(field.annotation), *limits]))
            yield key, kind, "required" if field.is_required() else _value(default)
    else:
        assert dataclasses.is_dataclass(model)
        for one in dataclasses.fields(model):
            kind = _WRITTEN_AS.get(one.name) or _kind(get_type_hints(model)[one.name])
            yield one.name, kind, _value(one.default)


_WRITTEN_AS = {
    "tensor_types": "pattern: type",
    "imatrix": "true, or a file",
    "split_max_size": "a size, such as 2G",
    "rounding": "`closed-form` or `learned`",
    "skip": "list of patterns",
    "overrides": "pattern: scheme",
}
"""What a recipe has where a dataclass has what was made of it."""

_WORDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
}


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(map(_kind, inner))
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in inner)
    if origin is list:
        return f"list of: {_kind(inner[0])}"
    if origin is dict:
        return "keys and values"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _WORDS[annotation]


def _limit(limit: Any) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    found = [f"{said} {getattr(limit, key)}" for key, said in words.items() if hasattr(limit, key)]
    return ", ".join(found)


def _value(default: Any) -> str:
    if default in (None, PydanticUndefined):
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, BaseModel):
        return "its defaults"
    if isinstance(default, list | tuple | dict):
        return f"`{list(default)}`" if default else "none"
    return f"`{default}`" if default != "" else "empty"


# Markdown


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return [re.sub(" +", " ", "\n".join(lines)), ""]


if __name__ == "__main__":
    for _name, _page in pages().items():
        (_HERE / _name).write_text(_page, encoding="utf-8")
