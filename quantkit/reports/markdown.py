"""Setting text as Markdown: whatever comes from a ledger stays what it is on GitHub."""

from __future__ import annotations

import re
from collections.abc import Sequence

from quantkit.ledger import Row
from quantkit.reports.prose import Name, Prose
from quantkit.reports.table import Cell, Column

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#&$])")


class Markdown(str):
    """Text that is Markdown already, and not to be escaped again."""

    __slots__ = ()


def escape(value: object) -> Markdown:
    """On one line, with everything escaped that Markdown or HTML would act on."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_SPECIAL.sub(r"\\\1", re.sub(r"\s*[\r\n]\s*", " ", str(value))))


def code(value: object) -> Markdown:
    """A code span on one line, however many backticks are in it."""
    line = " ".join(str(value).split())
    fence = "`" * (_longest_fence(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return Markdown(f"{fence}{pad}{line}{pad}{fence}")


def cell(value: object) -> Markdown:
    """A code span for a table, where a bar would end the cell even inside one."""
    return Markdown(code(value).replace("|", "\\|"))


def block(value: object) -> Markdown:
    """A fenced block, its fence longer than any in the text."""
    fence = "`" * max(3, _longest_fence(str(value)) + 1)
    return Markdown(f"{fence}text\n{str(value).rstrip()}\n{fence}")


def prose(parts: Prose) -> Markdown:
    """A sentence with its names as code."""
    return Markdown("".join(code(p.text) if isinstance(p, Name) else escape(p) for p in parts))


def grid(rows_and_columns: tuple[Sequence[Row], Sequence[Column]]) -> Markdown:
    """A table with the variant on the left; a column's group stands before its title."""
    rows, columns = rows_and_columns
    lines = [
        ["variant", *(escape(f"{column.group}: {column.title}") for column in columns)],
        ["---", *("---:" for _ in columns)],
    ]
    for index, row in enumerate(rows):
        cells = [column.cells[index] for column in columns]
        lines.append([cell(row.id), *(escape(_on_one_line(one)) for one in cells)])
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _on_one_line(cell: Cell) -> str:
    text = cell.text.replace("\n", ", ")
    detail = cell.detail if cell.detail.startswith("±") else f"({cell.detail})"
    return f"{text} {detail}" if cell.detail else text


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
