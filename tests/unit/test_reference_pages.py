"""docs/cli.md and docs/recipe.md are what the code says, and leave nothing out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from docs.reference import COMMAND, docstrings, pages
from quantkit.benchmark.section import BenchSection
from quantkit.cli.main import cli
from quantkit.data.section import CalibrationSection
from quantkit.evaluation.section import EvaluateSection
from quantkit.ledger.load import Slo
from quantkit.producers.gguf.options import Options
from quantkit.producers.linear_options import LinearOptions
from quantkit.runs.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs"
MODELS = (Recipe, CalibrationSection, EvaluateSection, BenchSection, Slo, Options, LinearOptions)


@pytest.mark.parametrize("name", pages())
def test_page_is_current(name: str) -> None:
    there = (DOCS / name).read_text(encoding="utf-8")
    assert there == pages()[name], f"docs/{name} is not what the code says; run: {COMMAND}"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_recipe_page_explains_every_key(model: type) -> None:
    said = docstrings(model)
    for key in model.__annotations__:
        if key.startswith("model_"):
            continue
        assert re.search(rf"^\| `{key}` \| [^|]+ \| [^|]+ \| \S.*[^|]+ \|$",
                         pages()["recipe.md"].replace(r"\|", ""), re.MULTILINE), key  # fmt: skip
        assert said[key].endswith("."), key


def test_docstrings_are_those_under_the_fields() -> None:
    class Example:
        a: int = 1
        """One ``a``,
        in two lines."""
        b: int = 2
        c: int = 3
        "Of c."

    assert docstrings(Example) == {"a": "One `a`, in two lines.", "c": "Of c."}


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_command_page_has_every_command_with_every_option() -> None:
    sections = {part.partition("\n")[0]: part for part in pages()["cli.md"].split("\n## ")}
    commands = dict(_commands(cli, "quantkit"))
    assert list(sections)[1:] == list(commands)
    for name, command in commands.items():
        for one in command.params:
            shown = one.opts[0] if isinstance(one, click.Option) else one.human_readable_name
            assert f"\n| `{shown}" in sections[name], (name, shown)
