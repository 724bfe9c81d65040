# ruff: noqa: RUF001 (the report writes a real minus sign)
from __future__ import annotations

import math
import random

import pytest

from quantkit.report import format as text
from quantkit.report.noise import Served, at_chance, comparable, differ, fastest, tiers
from quantkit.report.scales import Scale, around, from_zero, logarithmic
from tests.ledgers import bench, metric, quickstart


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


def test_two_values_differ_beyond_196_errors_of_their_difference() -> None:
    a = metric(10.0, 0.3)  # with 0.4: the error of the difference is 0.5, so the limit is 0.98
    assert differ(a, metric(10.97, 0.4)) is False
    assert differ(a, metric(10.99, 0.4)) is True
    assert differ(a, metric(99.0, None)) is None
    assert differ(a, metric(math.nan, 0.4)) is None


def test_other_protocols_are_not_compared() -> None:
    a, b = metric(1.0, 0.1), metric(9.0, 0.1, protocol={"context": 2048})
    assert not comparable(a, b)
    assert differ(a, b) is None


def test_tiers_are_the_components_of_what_cannot_be_told_apart() -> None:
    """Against a slow search: two ids share a tier where a chain of such pairs joins them."""
    rng = random.Random(7)
    for _ in range(300):
        metrics = {
            str(i): metric(rng.uniform(0, 10), rng.choice([0.05, 0.3, 2.0])) for i in range(8)
        }
        expected = {frozenset([id_]) for id_ in metrics}
        for a in metrics:
            for b in metrics:
                if not differ(metrics[a], metrics[b]):
                    both = {group for group in expected if a in group or b in group}
                    expected = (expected - both) | {frozenset().union(*both)}
        found = tiers(metrics)
        assert {frozenset(group) for group in found} == expected
        lows = [min(metrics[id_].value for id_ in group) for group in found]
        assert lows == sorted(lows)


def test_tiers_leave_out_what_has_no_error() -> None:
    assert tiers({"a": metric(1.0, None), "b": metric(2.0, 0.1)}) == [["b"]]


def test_fastest_names_all_within_a_tenth_of_the_highest() -> None:
    row = quickstart().variants[1]
    served = [Served(row, bench("vllm 1", 1, rate, 10.0)) for rate in (89.9, 100.0, 90.1)]
    assert [one.bench.output_tokens_per_s for one in fastest(served)] == [100.0, 90.1]
    assert fastest([Served(row, bench("vllm 1", 1, math.nan, 10.0)), *served])[0] is served[1]
    assert fastest([]) == []


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
