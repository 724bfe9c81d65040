# ruff: noqa: RUF001 (the report writes a real minus sign)
from __future__ import annotations

import math
import random

import pytest

from quantkit.ledger import OnText, is_accuracy
from quantkit.reports import format as text
from quantkit.reports.noise import (
    Served,
    against_reference,
    at_chance,
    comparable,
    fastest,
    tiers,
)
from quantkit.reports.scales import Scale, around, from_zero, logarithmic
from quantkit.reports.table import shown, task_title
from tests import loads
from tests.engine_configs import config
from tests.ledger_rows import DOCS, bench, metric
from tests.ledgers import quickstart, unmeasured, with_row


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (0.0, 3, "0"),
        (None, 3, "–"),
        (math.nan, 3, "not finite"),
        (-math.inf, 3, "not finite"),
        (131.4, 3, "131"),
        (71.04, 3, "71.0"),
        (0.0241, 3, "0.0241"),
        (0.00012, 2, "0.00012"),
        (3.14159e-6, 3, "3.14e−6"),
        (-1234567.0, 3, "−1,234,567"),
    ],
)
def test_number_keeps_significant_digits(value: float | None, digits: int, expected: str) -> None:
    assert text.number(value, digits) == expected


@pytest.mark.parametrize(
    ("value", "stderr", "expected"),
    [
        (21.43127, 0.31271, ("21.43", "± 0.31")),
        (0.0241368, 0.00041, ("0.02414", "± 0.00041")),
        (1234.5, 12.3, ("1,234", "± 12")),
        (9.3e-7, 2.1e-8, ("9.30e−7", "± 2.1e−8")),
        (0.5, None, ("0.500", "")),
        (0.5, math.nan, ("0.500", "")),
        (math.nan, 0.1, ("not finite", "")),
    ],
)
def test_value_and_error_end_at_one_place(
    value: float, stderr: float | None, expected: tuple[str, str]
) -> None:
    assert text.plus_minus(value, stderr) == expected


def test_signed_has_no_sign_for_what_rounds_to_zero() -> None:
    shown = [text.signed(value, 1) for value in (0.04, -0.04, 0.06, -2.0)]
    assert shown == ["0.0", "0.0", "+0.1", "−2.0"]


def test_units() -> None:
    assert [text.size(n) for n in (512, 91_727_904, 999_900_000, None)] == [
        "512 B",
        "91.7 MB",
        "1.00 GB",
        "–",
    ]
    assert [text.duration(s) for s in (4.13, 59.4, 171.0, 7500.0)] == [
        "4.1 s",
        "59 s",
        "2 min 51 s",
        "2 h 05 min",
    ]
    assert [text.milliseconds(ms) for ms in (55.2, 1421.0)] == ["55 ms", "1.42 s"]
    assert [text.count(n) for n in (512, 134_515_008, 7_240_000_000)] == ["512", "135 M", "7.24 B"]


def test_other_protocols_are_not_compared() -> None:
    a, b = metric(1.0, 0.1), metric(9.0, 0.1, protocol={"context": 2048})
    assert not comparable(a, b)
    assert not comparable(a, metric(math.nan, 0.1))
    ledger = quickstart()
    pair = against_reference(ledger, ledger.variants[1], "ppl", DOCS)
    assert pair is not None
    assert (pair.a, pair.b) == ("reference", "gguf-Q8_0")
    changed = with_row(ledger, 1, texts={DOCS: OnText(metrics={"ppl": b})})
    assert against_reference(changed, changed.variants[1], "ppl", DOCS) is None


def test_tiers_go_by_the_paired_tests_and_not_by_the_errors_of_the_values() -> None:
    # 21.98 ± 0.32 against 21.43 ± 0.31: each alone says nothing, the windows in pairs do.
    assert tiers(quickstart(), "ppl", DOCS) == [
        ["reference", "gguf-Q8_0"],
        ["gguf-Q4_K_M"],
        ["gptq-w4g64", "awq-w4g64"],
        ["gguf-Q4_0"],
    ]
    assert len(tiers(quickstart(), "mmlu_acc")) == 1
    assert tiers(unmeasured(), "ppl", DOCS) == []


def test_fastest_names_all_that_repetitions_cannot_tell_apart() -> None:
    row = quickstart().variants[1]
    served = [
        Served(row, loads.bench(config("vllm 1"), 1, [rate, rate, rate]))
        for rate in (95.9, 100.0, 96.1)
    ]
    assert [one.bench.output_tokens_per_s for one in fastest(served)] == [100.0, 96.1]
    assert (
        fastest([Served(row, bench(config("vllm 1"), 1, math.nan, 10.0)), *served])[0] is served[1]
    )
    assert fastest([]) == []
    # One run each: a tenth.
    single = [Served(row, loads.bench(config("vllm 1"), 1, [rate])) for rate in (89.9, 100.0, 90.1)]
    assert [one.bench.output_tokens_per_s for one in fastest(single)] == [100.0, 90.1]


def test_of_many_concurrencies_three_are_shown() -> None:
    assert shown([1, 4]) == [1, 4]
    assert shown([1, 4, 16]) == [1, 4, 16]
    assert shown([1, 2, 4, 8, 16, 32]) == [1, 8, 32]
    assert shown([1, 2, 3, 4, 5, 100]) == [1, 5, 100]


def test_at_chance() -> None:
    assert at_chance("mmlu_acc", metric(0.29, 0.027))
    assert not at_chance("mmlu_acc", metric(0.31, 0.027))
    assert not at_chance("arc_acc", metric(0.25, 0.027))


def test_scale_maps_ends_and_middle() -> None:
    assert [Scale(0, 10, 100, 200)(v) for v in (0, 5, 10, 11)] == [100, 150, 200, 200]
    log = Scale(0.001, 10, 400, 0, log=True)
    assert [log(v) for v in (0.001, 0.1, 10, -1)] == [400, 200, 0, 400]


@pytest.mark.parametrize("make", [from_zero, around, logarithmic])
def test_ticks_are_few_inside_distinct_and_true(make) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(3)
    for _ in range(300):
        values = [10 ** rng.uniform(-7, 4) for _ in range(rng.randint(1, 6))]
        scale = make(values, 0.0, 500.0)
        ticks = scale.ticks(6)
        assert 1 <= len(ticks) <= 8
        assert len({tick.text for tick in ticks}) == len(ticks)
        for tick in ticks:
            assert 0 <= tick.at <= 500
            said = float(tick.text.replace("−", "-").replace(",", ""))
            assert scale(said) == pytest.approx(tick.at, abs=0.6)
        assert all(0 <= scale(value) <= 500 for value in values)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("mmlu_acc", "MMLU"),
        ("arc_easy_acc", "ARC EASY"),
        ("mine_exact_match", "MINE"),
        ("gsm8k_exact_match_strict-match", "GSM8K (strict-match)"),
        ("arc_easy_acc_norm", None),
        ("prompts_exact_match", None),
        ("wikitext_word_perplexity", None),
        ("ppl", None),
    ],
)
def test_which_metrics_count_right_answers(name: str, title: str | None) -> None:
    assert is_accuracy(name) == (title is not None)
    assert title is None or task_title(name) == title
