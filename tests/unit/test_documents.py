"""What README, CONTRIBUTING and docs/ say of files, commands, variables and messages is true."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from quantkit.cli.main import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for name in re.findall(
        r"`((?:quantkit|tests|recipes|evals|formats|engines|quantize)/[\w/.]*\w/?)`", text
    ):
        assert (ROOT / name).exists() or (ROOT / "quantkit" / name).exists(), name
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_index_leads_to_every_page() -> None:
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8"))
    assert sorted([*listed, "index.md"]) == sorted(path.name for path in DOCS.glob("*.md"))


def test_environment_page_has_every_variable_of_quantkit() -> None:
    page = (DOCS / "environment.md").read_text(encoding="utf-8")
    read = {
        name
        for path in (ROOT / "quantkit").rglob("*.py")
        for name in re.findall(r"QUANTKIT_[A-Z_]+", path.read_text(encoding="utf-8"))
    }
    assert set(re.findall(r"^\| `(QUANTKIT_[A-Z_]+)` \|", page, re.MULTILINE)) == read


def _messages() -> str:
    """Every string constant of the package and of its set-up; an f-string's values are …"""
    found = []
    for path in (*ROOT.glob("quantkit/**/*.py"), *ROOT.glob("install/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_said_in_these_words() -> None:
    page = " ".join((DOCS / "troubleshooting.md").read_text(encoding="utf-8").split())
    quoted = re.findall(r"\*\*`([^`]+)`\*\*", page)
    assert len(quoted) > 15
    said = _messages()
    for message in quoted:
        for words in message.split("…"):
            assert words.strip(" :;") in said, message


def test_the_tree_in_the_readme_names_what_is_there() -> None:
    tree = README.split("## The repository")[1].split("```")[1]
    named = set(re.findall(r"[\w/]+\.py\b|\b[a-z]+/", tree))
    for name in named - {"quantkit/", "unit/", "integration/", "benchmarks/", "llamacpp/", "gguf/"}:
        found = [ROOT / name, ROOT / "docs" / name, ROOT / "quantkit" / name]
        found += [p / name for p in (ROOT / "quantkit").iterdir() if p.is_dir()]
        assert any(path.exists() for path in found), name
    top = {p.name for p in (ROOT / "quantkit").iterdir() if p.is_dir() and p.name[0] != "_"}
    assert {f"{name}/" for name in top} <= named
