"""The report as a reader sees it, in a headless Chromium: nothing missing, hidden, or fetched."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from quantkit import reports as report
from quantkit.ledger import Ledger
from quantkit.recommendation.front import front
from quantkit.reports.underway import Underway
from tests import browser, fetch_axe, ledgers
from tests.browser import Page
from tests.ledger_rows import DOCS

pytestmark = pytest.mark.skipif(
    browser.chromium() is None,
    reason="no Chromium to look at the report with: apt-get install chromium",
)

EVERY = (
    "quickstart", "two_texts", "failed", "without_bench", "unmeasured", "hostile", "crowded",
    "swept",
)  # fmt: skip

IDS = "[...document.querySelectorAll('#table .variants tbody th code')].map(e => e.textContent)"
BOXES = """[...document.querySelectorAll(%s)].map(e => {
  const r = e.getBoundingClientRect();
  const s = (e.closest("svg.chart") ?? document.documentElement).getBoundingClientRect();
  return {what: e.getAttribute("aria-label") ?? e.textContent, left: r.left, top: r.top,
          right: r.right, bottom: r.bottom, chart: [s.left, s.top, s.right, s.bottom]};
})"""


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browser.page() as page:
        page.size(1280)
        yield page


def show(tab: Page, name: str, directory: Path) -> Ledger:
    """Open the report of one of our ledgers, with nothing asked or complained of before."""
    ledger: Ledger = getattr(ledgers, name)()
    path = report.write(ledger, directory)
    tab.requests.clear()
    tab.complaints.clear()
    tab.open(path)
    return ledger


def boxes(tab: Page, selector: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tab.run(BOXES % repr(selector))
    return found


def overlap(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """By more than half a pixel, which is what rounding may cost."""
    return bool(
        min(a["right"], b["right"]) - max(a["left"], b["left"]) > 0.5
        and min(a["bottom"], b["bottom"]) - max(a["top"], b["top"]) > 0.5
    )


def assert_inside(box: dict[str, Any]) -> None:
    left, top, right, bottom = box["chart"]
    assert left - 0.5 <= box["left"] <= box["right"] <= right + 0.5, box
    assert top - 0.5 <= box["top"] <= box["bottom"] <= bottom + 0.5, box


@pytest.mark.parametrize("name", EVERY)
def test_it_asks_for_nothing_complains_of_nothing_and_has_every_row(
    tab: Page, name: str, tmp_path: Path
) -> None:
    ledger = show(tab, name, tmp_path)
    asked = [url for url in tab.requests if url != "data:,"]
    assert asked == [(tmp_path / "report.html").as_uri()]
    assert tab.complaints == []
    seen = tab.run(
        "[...document.querySelectorAll('#table .variants tbody th code')].map(e => e.textContent)"
    )
    assert seen == [row.id for row in ledger.variants]
    samples = tab.run("[...document.querySelectorAll('blockquote')].map(e => e.textContent)")
    assert samples == [r.sample.prompt + r.sample.completion for r in ledger.variants if r.sample]


def test_the_tab_notices_requests_and_complaints(tab: Page, tmp_path: Path) -> None:
    """The oracle of the test above: it can fail."""
    path = tmp_path / "bad.html"
    path.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('ouch')</script>")
    tab.open(path)
    assert "http://127.0.0.1:9/x.png" in tab.requests
    assert any("ouch" in complaint for complaint in tab.complaints)


@pytest.mark.parametrize("name", ["quickstart", "without_bench", "hostile", "crowded"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_picture_has_every_point_and_no_label_touches_anything(
    tab: Page, name: str, concurrency: int, tmp_path: Path
) -> None:
    ledger = show(tab, name, tmp_path)
    tab.run(f"document.querySelector('.choice input[value=\"{concurrency}\"]').click()")
    figure = f"figure.tradeoff[data-concurrency='{concurrency}'] "
    points = boxes(tab, figure + ".point .shape")
    words = tab.run(f'[...document.querySelectorAll("{figure}.point")].map(e => e.ariaLabel)')
    served = [
        r.id
        for r in ledger.variants
        if any(b.concurrency == concurrency for b in r.bench) and not r.failed
    ]
    assert [line[: len(id_)] for line, id_ in zip(words, served, strict=True)] == served
    labels = boxes(tab, figure + "text.label")
    assert len(labels) == len(points) == len(served)
    for box in points + labels:
        assert box["right"] - box["left"] > 3
        assert_inside(box)
    for a, b in combinations(labels, 2):
        assert not overlap(a, b), (a, b)
    for label in labels:
        assert not any(overlap(label, point) for point in points), label


def test_the_recommendation_is_the_first_thing_one_reads(tab: Page, tmp_path: Path) -> None:
    show(tab, "swept", tmp_path)
    first = tab.run("document.querySelector('.advice').innerText.trim().split('\\n')")
    assert first[0] == "Which quantized variant to ship, for a laptop"
    assert "Ship gguf-Q4_K_M on llamacpp." in first
    (box,) = boxes(tab, ".advice")
    assert box["bottom"] < 800  # on a laptop's screen without scrolling
    (ring,) = boxes(tab, "figure:not([hidden]) .point .ring")
    script = "[...document.querySelectorAll('figure:not([hidden]) .point')].map(e => e.ariaLabel)"
    ids = [label.split("\n")[0] for label in tab.run(script)]
    shapes = boxes(tab, "figure:not([hidden]) .point .shape")
    assert overlap(ring, shapes[ids.index("gguf-Q4_K_M")])
    tab.run("document.querySelector('.choice input[value=\"32\"]').click()")
    assert boxes(tab, "figure:not([hidden]) .point .ring") == []  # it is about one at a time


def test_who_is_beaten_stands_back_and_lies_in_the_shade(tab: Page, tmp_path: Path) -> None:
    ledger = show(tab, "swept", tmp_path)
    tab.run("document.querySelector('.choice input[value=\"32\"]').click()")
    standing = {(one.candidate.row.id, one.candidate.engine): one for one in front(ledger, 32)}
    script = """[...document.querySelectorAll('figure:not([hidden]) .point')].map(e => {
      const [id, engine] = e.ariaLabel.split("\\n");
      const core = e.querySelector(".core");
      const at = new DOMPoint(core.cx.baseVal.value - 1, core.cy.baseVal.value - 1);
      const shade = e.closest("svg").querySelector(".beaten");
      return [id, engine.split(" ")[0], getComputedStyle(e).opacity, shade.isPointInFill(at)];
    })"""
    points = tab.run(script)
    assert len(points) == len(standing) == 8
    for id_, engine, opacity, shaded in points:
        one = standing[id_, engine]
        assert (float(opacity) < 0.5) == (one.standing == "dominated")
        assert shaded  # up to the left of its edge
        assert one.on_line or one.standing != "front"


def test_the_picture_orders_points_by_their_numbers(tab: Page, tmp_path: Path) -> None:
    ledger = show(tab, "quickstart", tmp_path)
    tab.run("document.querySelector('.choice input[value=\"4\"]').click()")
    cores = boxes(tab, "figure.tradeoff[data-concurrency='4'] .point .core")
    rates = [row.bench[1].output_tokens_per_s for row in ledger.variants]
    lost = [row.texts[DOCS].metrics["kld_mean"].value for row in ledger.variants]
    order = range(len(cores))
    assert sorted(order, key=lambda i: cores[i]["left"]) == sorted(order, key=rates.__getitem__)
    assert sorted(order, key=lambda i: -cores[i]["top"]) == sorted(order, key=lost.__getitem__)
    areas = boxes(tab, "figure.tradeoff[data-concurrency='4'] .point .shape")
    widths = [box["right"] - box["left"] for box in areas]
    # Same shape: areas go as the bytes do.
    q8, q4 = ledger.variants[1].bytes, ledger.variants[3].bytes
    assert q8 is not None
    assert q4 is not None
    border = 1.5 * 1124 / 960
    assert ((widths[1] - border) / (widths[3] - border)) ** 2 == pytest.approx(q8 / q4, rel=0.1)


@pytest.mark.parametrize(
    "name", ["quickstart", "two_texts", "hostile", "crowded", "failed", "swept"]
)
def test_no_text_of_the_other_charts_is_cut_off_or_covered(
    tab: Page, name: str, tmp_path: Path
) -> None:
    show(tab, name, tmp_path)
    swept = ("#load", "#claims") if name == "swept" else ()
    for section in ("#drift", "#serving", *swept):
        texts = boxes(tab, f"{section} svg.chart text")
        assert texts
        for box in texts:
            assert_inside(box)
        for a, b in combinations(texts, 2):
            assert not overlap(a, b), (a, b)
        for mark in boxes(tab, f"{section} svg.chart .mark"):
            assert_inside(mark)


def test_verdicts_and_worst_positions_are_seen(tab: Page, tmp_path: Path) -> None:
    ledger = show(tab, "quickstart", tmp_path)
    cells = "[...document.querySelectorAll('.verdicts .worse')].map(e => e.parentElement.innerText)"
    worse = [
        pair.b for pair in ledger.comparisons if (pair.a, pair.verdict) == ("reference", "worse")
    ]
    assert [line.split()[0] for line in tab.run(cells)] == worse
    assert len(boxes(tab, "#where summary")) == 5
    tab.run("[...document.querySelectorAll('#where details')].forEach(e => e.open = true)")
    for box in boxes(tab, "#where .worst code"):
        assert box["right"] - box["left"] > 3
    assert "↵" in tab.run("document.querySelector('#where .worst').innerText")


def test_a_click_on_a_heading_sorts_and_what_has_no_value_stays_last(
    tab: Page, tmp_path: Path
) -> None:
    show(tab, "failed", tmp_path)
    heading = "[...document.querySelectorAll('.sort')].find(e => e.textContent === 'KLD mean')"
    tab.run(f"{heading}.click()")
    assert tab.run(IDS) == [
        "reference", "gguf-Q8_0", "gguf-Q4_K_M", "gptq-w4g64", "gguf-Q4_0", "awq-w4g64",
    ]  # fmt: skip
    assert tab.run(f"{heading}.closest('th').ariaSort") == "ascending"
    tab.run(f"{heading}.click()")
    assert tab.run(IDS)[0] == "gguf-Q4_0"
    assert tab.run(IDS)[4:] == ["reference", "awq-w4g64"]  # 0 is a value, none is not
    reason = "document.querySelector('.variants tbody:last-child .reason').textContent"
    assert "group_size 64 does not divide in_features 1000" in tab.run(reason)


def test_pointing_at_a_mark_shows_its_exact_values(tab: Page, tmp_path: Path) -> None:
    show(tab, "quickstart", tmp_path)
    tab.run("document.querySelector('.choice input[value=\"4\"]').click()")
    tab.run("document.querySelectorAll('figure:not([hidden]) .point')[1].focus()")
    tip = tab.run("document.querySelector('.tip:not([hidden])').textContent")
    assert tip.splitlines() == [
        "gguf-Q8_0",
        "llamacpp 0.3.36",
        "118 (111 to 125) output tokens/s",
        "KLD mean 0.000940 ± 0.000020 nats",
        "top-1 agreement 98.7 %",
        "145 MB, 8.52 bits/weight",
        "on the front: no other is both faster and nearer",
    ]


@pytest.mark.parametrize("width", [360, 820, 1280, 1920])
@pytest.mark.parametrize("name", ["quickstart", "hostile"])
def test_only_tables_and_charts_scroll_sideways(
    tab: Page, name: str, width: int, tmp_path: Path
) -> None:
    tab.size(width)
    try:
        show(tab, name, tmp_path)
        assert tab.run("document.documentElement.scrollWidth") <= width
    finally:
        tab.size(1280)


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(tab: Page, colours: str, tmp_path: Path) -> None:
    tab.prefer(colours)
    try:
        show(tab, "failed", tmp_path)
        style = "getComputedStyle(document.querySelector({!r})).{}"
        paper = tab.run(style.format("body", "backgroundColor"))
        assert (luminance(paper) < 0.2) == (colours == "dark")
        for selector in (
            "body", ".muted", "a", ".reason td", "summary", "thead th", ".verdicts .worse",
        ):  # fmt: skip
            assert contrast(tab.run(style.format(selector, "color")), paper) >= 4.5, selector
        for engine in (".e0", ".e1"):  # graphics: 3
            assert contrast(tab.run(style.format(f"svg {engine}", "stroke")), paper) >= 3.0
        care = tab.run(style.format(".care", "backgroundColor"))
        assert contrast(tab.run(style.format(".care h2", "color")), care) >= 4.5
    finally:
        tab.prefer("light")


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` as WCAG 2 defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def rows_of(tab: Page, label: str) -> list[dict[str, str]]:
    """What the CSV button of a table would save, read back."""
    text = tab.run(f"csv(document.querySelector('[aria-label=\"{label}\"] table'))")
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_files_have_the_ledgers_numbers(tab: Page, tmp_path: Path) -> None:
    ledger = show(tab, "two_texts", tmp_path)
    tables = "[...document.querySelectorAll('.scroll')].filter(e => e.querySelector('%s'))"
    tables %= "table:not(.picks)"
    assert tab.run(f"{tables}.every(e => e.nextElementSibling.className === 'csv')")
    found = rows_of(tab, "Table of all variants")
    assert [one["variant"] for one in found] == [row.id for row in ledger.variants]
    assert [int(one["Size on disk"]) for one in found] == [row.bytes for row in ledger.variants]
    every = rows_of(tab, "Every metric")
    for one, row in zip(every, ledger.variants, strict=True):
        assert one["variant"] == row.id
        for text, name, metric in row.all_metrics:
            title = f"{text} {name}" if text else name
            assert float(one[title]) == metric.value
            error = one.get(f"{title}, standard error", "")
            assert (float(error) if error else None) == metric.stderr
    loads = rows_of(tab, "Every load")
    assert [float(one["tokens/s"]) for one in loads] == [
        bench.output_tokens_per_s for row in ledger.variants for bench in row.bench
    ]


def test_csv_has_no_word_of_pictures_and_nothing_where_nothing_was_measured(
    tab: Page, tmp_path: Path
) -> None:
    ledger = show(tab, "failed", tmp_path)
    found = rows_of(tab, "Table of all variants")
    (failed,) = [one for one, row in zip(found, ledger.variants, strict=True) if row.failed]
    assert set(failed.values()) == {failed["variant"], ""}
    if tab.run("document.querySelector('.times') !== null"):
        label = tab.run("document.querySelector('.times').closest('.scroll').ariaLabel")
        assert "prepare:" not in tab.run(
            f"csv(document.querySelector('[aria-label=\"{label}\"] table'))"
        )


def test_csv_of_hostile_names_is_read_back(tab: Page, tmp_path: Path) -> None:
    ledger = show(tab, "hostile", tmp_path)
    found = rows_of(tab, "Table of all variants")
    assert [one["variant"] for one in found] == [row.id.strip() for row in ledger.variants]


def test_each_row_has_a_link_and_is_marked_when_it_is_followed(tab: Page, tmp_path: Path) -> None:
    ledger = show(tab, "swept", tmp_path)
    links = tab.run("[...document.querySelectorAll('.permalink')].map(e => e.hash.slice(1))")
    ids = tab.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)
    assert {f"row-{row.id}" for row in ledger.variants} <= set(links)
    load = "load-gguf-Q8_0-vllm-0.32.0-8-at-a-time"
    assert load in links
    assert tab.run(f"document.getElementById('{load}').closest('details').open") is False
    tab.run(f"location.hash = '{load}'")
    tab.run("new Promise(done => setTimeout(done, 50))")
    assert tab.run(f"document.getElementById('{load}').closest('details').open") is True
    paints = "getComputedStyle(document.getElementById('%s').cells[1]).backgroundColor"
    assert tab.run(paints % load) != tab.run(paints % "load-gguf-Q8_0-vllm-0.32.0-1-at-a-time")


@pytest.mark.skipif(not fetch_axe.script().is_file(), reason="python -m tests.fetch_axe first")
@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize(
    "name", ["quickstart", "two_texts", "swept", "hostile", "failed", "underway"]
)
def test_axe_finds_no_serious_barrier(
    tab: Page, name: str, width: int, colours: str, tmp_path: Path
) -> None:
    tab.size(width)
    tab.prefer(colours)
    try:
        if name == "underway":
            going = Underway("gguf-Q8_0: evaluate", 3, 9, ("gptq-w4g64",), 100.0)
            tab.open(report.write_page(ledgers.without_bench(), tmp_path, going))
        else:
            show(tab, name, tmp_path)
        tab.run("for (const one of document.querySelectorAll('details')) one.open = true")
        tab.run(fetch_axe.script().read_text(encoding="utf-8"))
        found = tab.run(
            "axe.run().then(found => found.violations.map(one => ({id: one.id, "
            "impact: one.impact, where: one.nodes.slice(0, 3).map(node => node.html)})))"
        )
        grave = [one for one in found if one["impact"] in ("serious", "critical")]
        assert grave == []
        wide = tab.run("document.documentElement.scrollWidth")
        assert wide <= width  # tables scroll in their own regions
    finally:
        tab.size(1280)
        tab.prefer("light")


def test_axe_would_find_a_barrier(tab: Page, tmp_path: Path) -> None:
    """The oracle of the test above: it can fail."""
    if not fetch_axe.script().is_file():
        pytest.skip("python -m tests.fetch_axe first")
    path = tmp_path / "bad.html"
    path.write_text("<html><title>x</title><img src='data:,'><button></button></html>")
    tab.open(path)
    tab.run(fetch_axe.script().read_text(encoding="utf-8"))
    found = tab.run("axe.run().then(found => found.violations.map(one => one.id))")
    assert {"button-name", "image-alt"} <= set(found)
