"""What README and CONTRIBUTING say of files and commands is true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from quantkit.cli.main import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _commands() -> list[list[str]]:
    """The `quantkit …` lines of README's code blocks, without comments, as words."""
    blocks = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("quantkit ")]


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_commands_of_the_readme_parse(words: list[str]) -> None:
    command: click.Command = cli
    while isinstance(command, click.Group):
        name = words.pop(0)
        assert name in command.commands
        command = command.commands[name]
    command.make_context(command.name, words)  # raises UsageError for what it does not know


def test_there_are_commands_and_make_targets() -> None:
    assert {words[0] for words in _commands()} >= {"run", "convert", "evaluate", "bench", "serve"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    quoted = re.findall(
        r"`((?:quantkit|tests|recipes|evals|formats|engines|quantize)/[\w/.]*\w/?)`", text
    )
    assert linked or quoted
    for name in {*linked, *quoted}:
        assert (ROOT / name).exists() or (ROOT / "quantkit" / name).exists(), name


def test_the_tree_in_the_readme_names_what_is_there() -> None:
    tree = README.split("## The repository")[1].split("```")[1]
    named = set(re.findall(r"[\w/]+\.py\b|\b[a-z]+/", tree))
    for name in named - {"quantkit/", "unit/", "integration/", "benchmarks/", "llamacpp/", "gguf/"}:
        found = [ROOT / name, ROOT / "quantkit" / name]
        found += [p / name for p in (ROOT / "quantkit").iterdir() if p.is_dir()]
        assert any(path.exists() for path in found), name
    top = {p.name for p in (ROOT / "quantkit").iterdir() if p.is_dir() and p.name[0] != "_"}
    assert {f"{name}/" for name in top} <= named
