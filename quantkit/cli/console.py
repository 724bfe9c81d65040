"""Results on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True
) -> None:
    """The first column to the left, the others to the right where they are numbers; piped, as wide
    as it needs."""
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 400
    console.print(table)


def print_json(value: Any) -> None:
    """Indented; what is not JSON as its text."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def printable(text: str) -> str:
    """On one line, and nothing in it that a terminal would act on."""
    shown = text.replace("\n", "↵")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)
