# ruff: noqa: RUF001 (the report writes a real minus sign)
from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from quantkit import reports as report
from quantkit.ledger import Ledger
from quantkit.reports.markdown import block, cell, code, escape
from quantkit.reports.pages import html, markdown
from tests import ledgers

MARKDOWN_TAGS = {
    "h1", "h2", "h3", "p", "ul", "li", "strong", "code", "pre", "details", "summary",
    "table", "thead", "tbody", "tr", "th", "td",
}  # fmt: skip
EVERY = ("quickstart", "failed", "without_bench", "unmeasured", "hostile", "crowded", "swept")


def made(name: str) -> Ledger:
    ledger: Ledger = getattr(ledgers, name)()
    return ledger


class Elements(HTMLParser):
    """Which elements and attributes a page has, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", EVERY)
def test_both_pages_are_written_with_every_row(name: str, tmp_path: Path) -> None:
    ledger = made(name)
    path = report.write(ledger, tmp_path)
    assert path == tmp_path / "report.html"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.md"]
    page = Elements(path.read_text(encoding="utf-8"))
    for row in ledger.variants:
        assert row.id in page.text
        if row.failed:
            assert row.failed.error in page.text
        if row.sample:
            assert row.sample.completion in page.text


@pytest.mark.parametrize("name", EVERY)
def test_nothing_in_the_page_leads_out_of_it(name: str) -> None:
    page = Elements(html(made(name)))
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert page.tags["script"] == 1


def test_hostile_strings_make_no_elements_or_attributes() -> None:
    tame, wild = (Elements(html(made(name))) for name in ("quickstart", "hostile"))
    assert set(wild.tags) - set(tame.tags) <= {"circle", "path"}
    assert wild.attributes <= tame.attributes
    assert wild.text.count(ledgers.HOSTILE) > 20


@pytest.mark.parametrize("name", EVERY)
def test_markdown_is_tables_and_text_only(name: str) -> None:
    ledger = made(name)
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown(ledger))
    page = Elements(rendered)
    assert set(page.tags) <= MARKDOWN_TAGS
    assert "---" not in page.text.replace(ledgers.HOSTILE, "")  # every table is one
    assert page.links == set()
    for row in ledger.variants:
        assert " ".join(row.id.split()) in page.text


def test_markdown_has_the_numbers_of_the_table() -> None:
    lines = markdown(made("quickstart")).splitlines()
    quality = next(line for line in lines if line.startswith("| `gguf-Q4_K_M` | 105"))
    assert quality == (
        "| `gguf-Q4_K_M` | 105 MB | 6.21 (5.68 quantized) | 21.98 ± 0.32 | +2.57 % (worse) "
        "| 0.02410 ± 0.00040 | 0.229 | 93.22 % ± 0.18 | 4.657 % ± 0.040 "
        "| 28.7 % ± 2.7 | −1.1 pt (undecided) |"
    )
    verdict = next(line for line in lines if line.startswith("| `gguf-Q4_0` | −1.8"))
    assert verdict == (
        "| `gguf-Q4_0` | −1.8 points | −5.7 to +1.8 | 1.000 | 17 | 12 | 16 | undecided "
        "| some 4,400 more questions |"
    )
    where = next(line for line in lines if line.startswith("| `gguf-Q4_K_M` | 0.025"))
    assert where.count("|") == 11
    speed = next(line for line in lines if line.startswith("| `gguf-Q4_K_M` | llamacpp"))
    assert speed == "| `gguf-Q4_K_M` | llamacpp 0.3.36 | 66.1 | 55 ms | 131 | 161 ms |"


@pytest.mark.parametrize("nasty", [ledgers.HOSTILE, "``", "`", "a|b", "<b>", "\\", "***", "[a](b)"])
def test_markdown_setting_gives_the_text_back(nasty: str) -> None:
    """Read again by a Markdown parser, in a sentence, in a table and in a block."""
    renderer = MarkdownIt("commonmark", {"html": True}).enable("table")
    line = " ".join(nasty.split())
    for setting in (escape, code):
        sentence = Elements(renderer.render(f"says {setting(nasty)} here"))
        assert set(sentence.tags) <= {"p", "code"}
        assert sentence.text.strip() == f"says {line} here"
    for setting in (escape, cell):
        table = Elements(renderer.render(f"| h |\n| --- |\n| {setting(nasty)} |"))
        assert set(table.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code"}
        assert " ".join(table.text.split()) == f"h {line}"
    fenced = Elements(renderer.render(block(nasty)))
    assert set(fenced.tags) == {"pre", "code"}
    assert fenced.text.strip("\n") == nasty
