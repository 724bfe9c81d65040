"""Progress of long work: log lines, and how far it is.

Lines are ordinary logging under the name ``quantkit``. How far a loop is goes to the ``Progress``
in use: quiet in a library, a bar or plain lines after ``to_terminal``, or a caller's own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 15.0
_LOG = logging.getLogger("quantkit")

T = TypeVar("T")


class Progress:
    """Shows nothing. Give ``show_progress`` a subclass of your own to hear of long loops."""

    @property
    def console(self) -> Console | None:
        """Where a table may be shown that changes as a run goes on; None: nowhere."""
        return None

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:  # noqa: ARG002
        """Yield the ``items`` of a loop that is called ``what``; there are ``total``."""
        yield from items


class Terminal(Progress):
    """Bars on stderr where that is a terminal, else a line every quarter of a minute."""

    @property
    def console(self) -> Console | None:
        """See ``Progress.console``."""
        return _console() if _console().is_terminal else None

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """See ``Progress.track``."""
        return _lines(items, what, total) if self.console is None else _bar(items, what, total)


def _bar(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_console(),
        transient=True,
    ) as bar:
        yield from bar.track(items, total=total, description=what)


def _lines(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            say(f"{what}: {done}/{total} ({now - started:.0f} s)")
        yield item


class _ToConsole(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _console().print(self.format(record), markup=False)


_current = Progress()


def show_progress(progress: Progress) -> None:
    """Have all long loops told to ``progress`` from now on."""
    global _current
    _current = progress


def progress() -> Progress:
    """What long loops report to."""
    return _current


def to_terminal(*, debug: bool = False) -> None:
    """Lines on stderr, and bars where that is a terminal; ``debug``: all that is logged."""
    show_progress(Terminal())
    _LOG.setLevel(logging.DEBUG if debug else logging.INFO)
    _LOG.propagate = False
    if not any(isinstance(handler, _ToConsole) for handler in _LOG.handlers):
        _LOG.addHandler(_ToConsole())


def say(line: str) -> None:
    """One line about what is being done."""
    _LOG.info("%s", line)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` and tell how far they are; ``total`` where they have no length."""
    count = total if total is not None else len(items)  # type: ignore[arg-type]
    return _current.track(items, what, count)


@cache
def _console() -> Console:
    """The one console for everything that is not a result."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)
