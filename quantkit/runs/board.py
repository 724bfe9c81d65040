"""A run's progress on a terminal: a table of rows and stages that changes as the steps do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from quantkit.system.progress import progress, say

_DOING, _WAITING = "…", "·"


class Board:
    """``steps``: the row and the stage of each, in the order in which they are done."""

    def __init__(self, steps: Sequence[tuple[str, str]]) -> None:
        self._rows = list(dict.fromkeys(row for row, _ in steps))
        self._stages = list(dict.fromkeys(stage for _, stage in steps))
        self._cells = dict.fromkeys(steps, _WAITING)
        self._since: dict[tuple[str, str], float] = {}
        self._title = ""

    def begin(self, step: tuple[str, str], title: str) -> None:
        """A step is being done; ``title`` says how far the run is."""
        self._title = title
        self._since[step] = time.monotonic()

    def end(self, step: tuple[str, str]) -> None:
        """A step has ended, in success or failure."""
        self._cells[step] = _seconds(time.monotonic() - self._since.pop(step))

    def __rich__(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("")
        for stage in self._stages:
            table.add_column(stage, justify="right", no_wrap=True)
        now = time.monotonic()
        for row in self._rows:
            steps = [(row, stage) for stage in self._stages]
            table.add_row(
                row,
                *(
                    f"{_DOING} {_seconds(now - self._since[step])}"
                    if step in self._since
                    else self._cells.get(step, "")
                    for step in steps
                ),
            )
        return Group(Text(self._title), table)


@contextmanager
def board(steps: Sequence[tuple[str, str]]) -> Iterator[Board]:
    """A board that is shown while the block runs; where there is no terminal, a line is logged as
    each step begins."""
    console = progress().console
    if console is None:
        yield _Lines(steps)
        return
    shown = Board(steps)
    with Live(shown, console=console, transient=True, refresh_per_second=2):
        yield shown


class _Lines(Board):
    def begin(self, step: tuple[str, str], title: str) -> None:
        super().begin(step, title)
        say(title)


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
