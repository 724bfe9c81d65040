"""The report: a run's ledger as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.files import write_text

if TYPE_CHECKING:
    from quantkit.ledger import Ledger


def write(ledger: Ledger, directory: Path) -> Path:
    """Write ``report.html`` and ``report.md`` into ``directory``; return the first's path."""
    from quantkit.report.pages import html, markdown

    path = directory / "report.html"
    write_text(path, html(ledger))
    write_text(directory / "report.md", markdown(ledger))
    return path
