"""Fill the templates. Whatever comes from the ledger is escaped on its way into a page."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import partial
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quantkit.ledger import Ledger
from quantkit.recommendation import Recommendation, by_default, profiles
from quantkit.reports import format as text
from quantkit.reports import texts
from quantkit.reports.cautions import cautions
from quantkit.reports.charts import drift_chart, serving_chart
from quantkit.reports.claims import claims, conclusion
from quantkit.reports.curves import curves
from quantkit.reports.drifts import profiles as drift_profiles
from quantkit.reports.drifts import verdicts, worst
from quantkit.reports.efficiency import efficiency_chart, loads
from quantkit.reports.findings import compared, findings, headlines
from quantkit.reports.markdown import block, cell, code, escape, grid, prose
from quantkit.reports.method import measured, pairs, recipe_text
from quantkit.reports.prompts import COLUMNS, answers, finding
from quantkit.reports.prose import Name, listing
from quantkit.reports.recommendation import RULE, WHOM, advice, picks
from quantkit.reports.split import losses
from quantkit.reports.table import by_text, engines, everything, table
from quantkit.reports.times import times
from quantkit.reports.tradeoff import tradeoffs
from quantkit.reports.underway import Underway, roughly
from quantkit.version import __version__


def html(ledger: Ledger, underway: Underway | None = None) -> str:
    """The whole page: style, script and charts are in it, and it may load nothing else.

    While the run is ``underway`` it says so, and reloads itself.
    """
    page = _environment(autoescape=True)
    page.filters.update(anchor=_anchor)
    found = by_default(ledger)
    # A page that may run only this one script runs none that a hostile string brings along.
    script = _packaged("report.js")
    drawn = tradeoffs(ledger, found)
    levels = [chart.concurrency for chart in drawn]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.get_template("report.html.j2").render(
        _content(ledger, found),
        style=Markup(_packaged("report.css")),
        script=Markup(script),
        script_digest=digest,
        tradeoffs=drawn,
        in_view=found.concurrency
        if found and found.concurrency in levels
        else max(levels, default=0),
        curves=curves(ledger, found),
        efficiency_chart=efficiency_chart(ledger),
        drift_chart=drift_chart(ledger),
        serving_chart=serving_chart(ledger),
        times=times(ledger),
        underway=underway,
        roughly=roughly,
    )


def markdown(ledger: Ledger) -> str:
    """The same answer and tables, without the charts, for a pull request."""
    page = _environment(autoescape=False, finalize=escape)
    page.filters.update(code=code, cell=cell, block=block, prose=prose, grid=grid)
    rendered = page.get_template("report.md.j2").render(
        _content(ledger, by_default(ledger)), fronts=tradeoffs(ledger)[::-1]
    )
    return re.sub(r"\n{3,}", "\n\n", rendered).strip() + "\n"


def _environment(**how_to_escape: Any) -> Environment:
    return Environment(
        loader=PackageLoader("quantkit.reports"),
        **how_to_escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _content(ledger: Ledger, found: Recommendation | None) -> dict[str, Any]:
    """What both pages say."""
    checked = claims(ledger)
    return {
        "ledger": ledger,
        "version": __version__,
        "compared": compared(ledger),
        "advice": advice(ledger, found) if found else None,
        "picks": picks(profiles(ledger)) if found else [],
        "whom": WHOM[found.profile] if found else "",
        "rule": RULE,
        "claims": checked,
        "conclusion": conclusion(checked) if checked else (),
        "loads": loads(ledger),
        "headlines": headlines(ledger),
        "findings": findings(ledger) + finding(ledger),
        "cautions": cautions(ledger),
        "table": table(ledger),
        "by_text": by_text(ledger),
        "everything": everything(ledger),
        "verdicts": verdicts(ledger),
        "losses": losses(ledger),
        "profiles": drift_profiles(ledger),
        "worst": worst,
        "answers": answers(ledger),
        "answer_columns": COLUMNS,
        "measured": measured(ledger),
        "recipe": recipe_text(ledger),
        "pairs": pairs,
        "text": text,
        "text_title": partial(texts.title, ledger),
        "is_name": lambda part: isinstance(part, Name),
        "engines": engines,
        "listing": listing,
    }


def _anchor(words: str) -> str:
    """What a link can name a row by: ``row-gguf-Q4_K_M``."""
    return re.sub(r"[^\w.-]+", "-", words).strip("-")


def _packaged(name: str) -> str:
    return (files("quantkit.reports") / "templates" / name).read_text(encoding="utf-8")
