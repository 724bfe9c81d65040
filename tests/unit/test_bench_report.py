from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from quantkit.benchmark.closed_loop import closed_loop
from quantkit.benchmark.loads import Times, Workload
from quantkit.benchmark.open_loop import Overloaded, open_loop
from quantkit.errors import EngineError
from quantkit.ledger.load import Reading, Slo
from tests.guidellm_reports import closed, request, spread, with_requests

WORKLOAD = Workload.synthetic(128, 32)
TIMES = Times(2.0, 10.0)


def read(benchmark: dict[str, Any], slo: Slo | None = None) -> Reading:
    return closed_loop(benchmark, WORKLOAD, TIMES, slo, "bench at concurrency 2")


def test_figures_are_taken_from_where_they_are_right() -> None:
    reading = read(closed())
    assert reading.output_tokens_per_s == 24.0  # with the tokens of requests that were cut off
    assert reading.request_per_s == 0.7  # completed ones only
    assert (reading.requests, reading.errors, reading.incomplete) == (7, 1, 2)
    assert reading.first_error == "401 Unauthorized"
    assert reading.ttft_ms.model_dump() == {"p50": 100.0, "p95": 200.0, "p99": 300.0}
    assert reading.itl_ms.p50 == 30.0
    assert reading.prompt_tokens == 128.5


def test_nothing_completed_is_an_error_with_the_reason() -> None:
    with pytest.raises(EngineError, match="concurrency 2: too slow: no request was completed"):
        read(closed(successful=0, errored=0))
    with pytest.raises(EngineError, match=r"all 3 requests failed: 401 Unauthorized$"):
        read(closed(successful=0, errored=3))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, None])
@pytest.mark.parametrize(
    "name", ["requests_per_second", "time_to_first_token_ms", "inter_token_latency_ms"]
)
def test_what_was_not_measured_is_never_a_number(name: str, bad: float | None) -> None:
    damaged = copy.deepcopy(closed(errored=0))
    found = damaged["metrics"][name]["successful"]
    found["mean"] = bad
    found["percentiles"] = dict.fromkeys(("p50", "p95", "p99"), bad)
    with pytest.raises(EngineError, match="no request was completed"):
        read(damaged)


def test_answers_of_another_length_are_an_error() -> None:
    damaged = closed()
    damaged["metrics"]["output_token_count"]["successful"] = spread(30, 12, 32)
    with pytest.raises(EngineError, match="answers of 12 to 32 tokens, expected 32"):
        read(damaged)


def test_a_closed_loop_attains_what_its_decided_requests_do() -> None:
    found = [
        request(0.0, late=0.05, ttft=0.15, itl=0.02),  # 100 ms after it was sent
        request(1.0, ttft=0.3),
        request(2.0, ttft=0.1, itl=0.06),
        request(3.0, outcome="failed", error="refused"),
        request(4.0, outcome="cut off"),  # nobody knows
    ]
    benchmark = {**closed(), **with_requests(found)}
    assert read(benchmark, Slo(ttft_ms=110, itl_ms=50)).attained == 1 / 4
    assert read(benchmark, Slo(itl_ms=50)).attained == 2 / 4
    assert read(benchmark).attained is None


def test_cached_tokens_are_counted_where_the_server_tells() -> None:
    told = {**closed(), **with_requests([request(0.0, cached=5), request(1.0, cached=0)])}
    assert read(told).cached_tokens == 5
    assert read({**closed(), **with_requests([request(0.0)])}).cached_tokens is None


def judge(
    found: list[dict[str, Any]], slo: Slo | None = None, start: float = 0.0
) -> tuple[Reading, float]:
    short = Workload.synthetic(64, 3)
    return open_loop(with_requests(found, start), short, Times(2.0, 10.0, 1.0), slo, "bench")


def test_an_open_loop_judges_what_was_due_in_its_window() -> None:
    slo = Slo(ttft_ms=500, itl_ms=50)
    found = [
        request(101.9, ttft=9.0),  # warm-up
        request(102.0, ttft=0.5),  # just in time
        request(103.0, ttft=0.501),
        request(104.0, itl=0.051),
        request(105.0, outcome="failed", error="refused"),
        request(111.9, ttft=0.4),  # answered after the window: it was due in it
        request(111.95, outcome="cut off"),  # the load went on as long as the objective allows
        request(112.0),  # after
    ]
    reading, _ = judge(found, slo, start=100.0)
    assert (reading.requests, reading.errors, reading.incomplete) == (4, 1, 1)
    assert reading.attained == 2 / 6
    assert reading.request_per_s == 0.4
    assert reading.first_error == "refused"
    # Tokens count when they came: of the request before the window, three at 110.9 and after; of
    # that due at 111.9 none, which came after the end.
    assert reading.output_tokens_per_s == pytest.approx((3 + 3 + 3 + 3) / 10)


def test_time_to_first_token_counts_from_when_a_request_was_due() -> None:
    """A client that is late must not hide how long a user would have waited."""
    reading, late = judge([request(3.0 + i, late=0.2, ttft=0.25) for i in range(5)])
    assert reading.ttft_ms.p50 == pytest.approx(250)
    assert late == pytest.approx(0.2)
    assert reading.attained is None


def test_percentiles_are_times_of_real_requests() -> None:
    reading, _ = judge([request(3 + i / 20, ttft=(i + 1) / 1000) for i in range(100)])
    found = reading.ttft_ms
    assert (found.p50, found.p95, found.p99) == pytest.approx((50, 95, 99))


def test_open_loops_that_say_nothing() -> None:
    with pytest.raises(EngineError, match="no request was due in the 10 s"):
        judge([request(0.5)])
    with pytest.raises(Overloaded, match="none of 2 requests was answered") as caught:
        judge([request(3.0, outcome="cut off"), request(4.0, outcome="cut off")])
    assert caught.value.requests == 2
    with pytest.raises(EngineError, match="all 1 requests failed: gone"):
        judge([request(3.0, outcome="failed", error="gone")])
    with pytest.raises(EngineError, match="an answer of 2 tokens, expected 3"):
        judge([request(3.0), request(4.0, tokens=2)])


def test_an_open_loop_goes_on_as_long_as_the_objective_allows() -> None:
    times = Times(2.0, 10.0)
    assert times.open_loop(Slo(ttft_ms=500, itl_ms=50), 33).after == pytest.approx(0.5 + 32 * 0.05)
    assert times.open_loop(Slo(ttft_ms=500), 33).after == 10.0
    assert times.open_loop(None, 33).after == 10.0


def test_an_objective_limits_something() -> None:
    with pytest.raises(ValueError, match="needs ttft_ms or itl_ms"):
        Slo()
