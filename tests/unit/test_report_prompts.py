from __future__ import annotations

from markdown_it import MarkdownIt

from quantkit.ledger.prompt_drift import PromptDrift
from quantkit.reports.pages import html, markdown
from quantkit.reports.prompts import answers, finding
from quantkit.reports.prose import plain
from tests import ledgers


def test_a_line_for_all_prompts_and_one_for_each_category() -> None:
    found = answers(ledgers.quickstart())
    assert [one.id for one in found] == [row.id for row in ledgers.quickstart().variants[1:]]
    # √(28/40 · 12/40 / 39) is 7.3 %; 2.2 √0.0241 leaves 17 of 26.
    assert [(line.title, line.cells[:2]) for line in found[1].lines] == [
        ("all prompts", ("40", "70.0 ± 7.3 %")),
        ("support", ("26", "65.4 ± 9.5 %")),
        ("code", ("14", "79 ± 11 %")),
    ]
    assert found[1].lines[0].cells[3:] == (
        "token 11.5 (mean 18.4)", "0.0193 ± 0.0029", "63.8", "64.3", "5 of 40",
    )  # fmt: skip


def test_the_finding_names_every_share() -> None:
    (found,) = finding(ledgers.quickstart())
    assert plain(found.text).startswith(
        "The reference's answer to 40 prompts, token by token: gguf-Q8_0 (92.5 ± 4.2 %), gguf"
    )
    assert finding(ledgers.unmeasured()) == []


def test_without_a_difference_there_is_no_error_and_no_pair() -> None:
    ledger = ledgers.quickstart()
    drift = ledger.variants[1].prompts
    assert drift is not None
    same = drift.overall.model_copy(
        update={
            "exact_match": 1.0, "exact_match_stderr": 0.0,
            "first_difference_mean": None, "first_difference_median": None,
        }
    )  # fmt: skip
    alike = PromptDrift(overall=same, categories=[], most_different=[])
    (found, *_) = answers(ledgers.with_row(ledger, 1, prompts=alike))
    assert [line.cells[1] for line in found.lines] == ["100 %"]
    assert found.lines[0].cells[3] == "–"
    page = html(ledgers.with_row(ledger, 1, prompts=alike))
    assert "answers every prompt with the reference's text" in page


def test_only_what_differs_is_marked() -> None:
    page = html(ledgers.quickstart())
    assert "returns within <mark>30 days, so I can&#39;t refund" in page
    assert "returns within <mark>60 days, so you will" in page
    assert '<mark class="end" title="ends here">∎</mark>' in page  # the reference says no more
    assert "Answers to prompts" not in html(ledgers.unmeasured())


def test_markdown_has_both_answers_in_one_line_each() -> None:
    text = markdown(ledgers.quickstart())
    assert "| `gguf-Q4_K_M` | support | 26 | 65.4 ± 9.5 % |" in text
    row = next(line for line in text.splitlines() if "returns within" in line)
    assert row == (
        "| `I am sorry to hear that. Our policy allows returns within` | `30 days, so I can't "
        "refund this order. What I can do is to offer a repair, or a voucher over the price.` | "
        "`60 days, so you will have the money back in a week.` |"
    )
    assert "| `def prime(n):` | ∎ | `return sympy.prime(n)` |" in text
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    assert "<td><code>60 days, so you will have the money back in a week.</code></td>" in rendered
    assert "Answers to prompts" not in markdown(ledgers.unmeasured())
