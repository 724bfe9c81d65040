"""Results as tables: in a terminal, in a notebook, and in pandas."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """``rows`` of as many cells as there are ``columns``; None where nothing is known."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of_records(cls, records: Sequence[dict[str, Cell]]) -> Table:
        """One row each; the columns in the order in which they first occur."""
        columns = tuple(dict.fromkeys(key for record in records for key in record))
        return cls(columns, tuple(tuple(r.get(key) for key in columns) for r in records))

    def __str__(self) -> str:
        lines = [self.columns, *(tuple(map(_shown, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        right = [all(map(_is_number, column)) for column in zip(*self.rows, strict=True)]
        shapes = list(zip(widths, right or [False] * len(widths), strict=True))
        return "\n".join(
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, (width, right) in zip(line, shapes, strict=True)
            ).rstrip()
            for line in lines
        )

    def html(self) -> str:
        """A ``<table>`` without a style of its own."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(_shown(cell))}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Tabular:
    """What prints as a table, in a terminal as in a notebook."""

    @abstractmethod
    def table(self) -> Table:
        """Everything that is worth a column."""

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()

    def to_pandas(self) -> pandas.DataFrame:
        """The table with its numbers as they are; needs pandas."""
        import pandas

        table = self.table()
        return pandas.DataFrame(list(table.rows), columns=list(table.columns))


def _is_number(cell: Cell) -> bool:
    return not isinstance(cell, str)


def _shown(cell: Any) -> str:
    if cell is None:
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
