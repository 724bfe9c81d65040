"""The report of a run that is not over yet, and of where its time went."""

from __future__ import annotations

import re

import pytest

from quantkit.ledger import Ledger, Row
from quantkit.reports.pages import html
from quantkit.reports.times import times
from quantkit.reports.underway import Underway
from tests import ledgers

UNDERWAY = Underway("gptq-w4g64: bench", 11, 20, ("gptq-w4g64", "awq-w4g64"), 250.0)


def _growing() -> list[Ledger]:
    """A run's ledger at its start, when its GGUF variants were evaluated, and near its end."""
    whole = ledgers.two_texts()

    def bare(row: Row) -> Row:
        return Row(id=row.id, spec=row.spec, path=row.path)

    own, *variants = whole.variants
    early = {"bench": [], "sample": None}
    evaluated = [own, *variants[:3]]
    return [
        whole.model_copy(update={"variants": rows, "texts": texts, "comparisons": []})
        for rows, texts in (
            ([bare(row) for row in whole.variants], []),
            (
                [*(one.model_copy(update=early) for one in evaluated), *map(bare, variants[3:])],
                whole.texts,
            ),
            ([own, *variants[:4], bare(variants[4])], whole.texts),
        )
    ]


@pytest.mark.parametrize("stage", range(3))
def test_a_report_is_a_page_at_every_step(stage: int) -> None:
    ledger = _growing()[stage]
    page = html(ledger, UNDERWAY)
    assert '<input type="checkbox" id="reload" checked>' in page
    said = re.sub("<[^>]+>", "", page)
    assert "The run is still going: gptq-w4g64: bench, step 12 of 20; about 4 min left" in said
    assert "Not finished: gptq-w4g64 and awq-w4g64." in said
    assert all(row.id in said for row in ledger.variants)


def test_a_finished_report_does_not_reload() -> None:
    page = html(ledgers.quickstart())
    assert 'id="reload"' not in page
    assert "still going" not in page


def test_an_interrupted_report_says_so_and_does_not_reload() -> None:
    ended = Underway("gptq-w4g64: bench", 11, 20, ("gptq-w4g64",), 250.0, ended=True)
    page = html(_growing()[1], ended)
    assert 'id="reload"' not in page
    assert "<strong>The run was interrupted</strong> at <code>gptq-w4g64: bench</code>" in page


def test_times_by_hand() -> None:
    ledger = ledgers.quickstart().model_copy(update={"seconds": 200.0})
    spent = [{"prepare": 10.0, "evaluate": 0.1, "bench": 40.0}, {"convert": 5.0, "bench": 20.0}]
    for index, seconds in enumerate(spent):
        ledger = ledgers.with_row(ledger, index, seconds=seconds)
    found = times(ledger)
    assert found is not None
    assert found.stages == ("prepare", "convert", "bench")  # 0.1 s was only looked up
    own, first, second = found.lines[:3]
    assert own.cells == ("10 s", "–", "40 s")
    assert (own.total, first.total, second.total) == ("50 s", "25 s", "0 s")
    # Of 100, which is the longest row.
    assert [(one.left, one.width) for one in own.pieces] == [(0, 20), (20, 80)]
    assert [(one.left, one.width, one.title) for one in first.pieces] == [
        (0, 10, "convert: 5.0 s"), (10, 40, "bench: 20 s"),
    ]  # fmt: skip
    assert second.pieces == ()
    assert found.rest == "2 min 05 s"
    assert "What took how long" in html(ledger)


def test_without_times_nothing_is_shown() -> None:
    assert times(ledgers.quickstart()) is None
    assert "What took how long" not in html(ledgers.quickstart())


def test_load_that_was_cut_to_the_budget_is_told() -> None:
    ledger = ledgers.quickstart()
    change = "2 of 3 repetitions, to stay within the budget of 30 s"
    for index in (1, 2):
        benches = [
            one.model_copy(update={"changes": [change]}) for one in ledger.variants[index].bench
        ]
        ledger = ledgers.with_row(ledger, index, bench=benches)
    said = re.sub("<[^>]+>", "", html(ledger))
    assert f"{change}: gguf-Q8_0 and gguf-Q4_K_M." in said
    assert said.count("Not all load was measured as the recipe asks") == 1
