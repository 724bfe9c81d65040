"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 15.0

T = TypeVar("T")


@cache
def console() -> Console:
    """The one console for everything that is not a result."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """One line about what is being done."""
    console().print(line, markup=False)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` and show how far they are; ``total`` where they have no length."""
    count = total if total is not None else len(items)  # type: ignore[arg-type]
    if console().is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console(),
            transient=True,
        ) as progress:
            yield from progress.track(items, total=count, description=what)
        return
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            say(f"{what}: {done}/{count} ({now - started:.0f} s)")
        yield item
