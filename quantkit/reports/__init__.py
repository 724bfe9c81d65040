"""The report: a run's ledger as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.system.files import write_text

if TYPE_CHECKING:
    from quantkit.ledger import Ledger
    from quantkit.reports.underway import Underway

PAGE = "report.html"


def write(ledger: Ledger, directory: Path) -> Path:
    """Write ``report.html`` and ``report.md`` into ``directory``; return the first's path."""
    from quantkit.reports.pages import markdown

    write_text(directory / "report.md", markdown(ledger))
    return write_page(ledger, directory)


def write_page(ledger: Ledger, directory: Path, underway: Underway | None = None) -> Path:
    """Write ``report.html`` alone; ``underway``: how far the run is, None where it is over."""
    from quantkit.reports.pages import html

    path = directory / PAGE
    write_text(path, html(ledger, underway))
    return path
