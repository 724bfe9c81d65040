"""What a terminal shows while a run goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from quantkit.runs.board import Board
from quantkit.runs.course import Step, run_course
from quantkit.system import progress

STEPS = [("a", "convert"), ("b", "convert"), ("a", "bench")]


def drawn(board: Board) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(board)
    return [line.split() for line in capture.get().splitlines()]


def test_board_has_a_row_and_a_column_for_each_and_says_where_it_is() -> None:
    board = Board(STEPS)
    board.begin(STEPS[0], "[1/3] a: convert (about 2 min left)")
    assert drawn(board) == [
        ["[1/3]", "a:", "convert", "(about", "2", "min", "left)"],
        ["convert", "bench"],
        ["a", "…", "0", "s", "·"],
        ["b", "·"],
    ]
    board.end(STEPS[0])
    board.begin(STEPS[2], "[3/3] a: bench")
    assert drawn(board)[2:] == [["a", "0", "s", "…", "0", "s"], ["b", "·"]]


def test_board_is_drawn_below_what_is_said_and_beside_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "_console", lambda: terminal)

    def work() -> None:
        assert list(progress.track(range(3), "blocks")) == [0, 1, 2]
        progress.say("a word from the work")

    run_course([Step("a", "convert", 1.0, work), Step("a", "bench", 1.0, work)], lambda _: None)
    shown = out.getvalue()
    assert shown.count("a word from the work") == 2
    assert "convert" in shown
    assert "[2/2] a: bench" in shown


def test_elsewhere_each_step_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out)
    monkeypatch.setattr(progress, "_console", lambda: console)
    steps = [Step("a", stage, 1.0, lambda: None) for stage in ("convert", "bench")]
    run_course(steps, lambda _: None)
    assert out.getvalue().splitlines() == [
        "[1/2] a: convert (about 10 s left)",
        "[2/2] a: bench (about 10 s left)",
    ]
