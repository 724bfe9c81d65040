from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from quantkit.bench import BenchOptions, guidellm
from quantkit.bench.guidellm import Load, parse
from quantkit.errors import EngineError, RecipeError
from quantkit.variant import Variant

LOAD = Load((2,), prompt_tokens=128, output_tokens=32, seconds=10, warmup_seconds=2)


def spread(mean: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """A GuideLLM distribution, with what is read of it."""
    percentiles = {"p50": mean, "p95": mean * 2, "p99": mean * 3}
    return {
        "mean": mean,
        "min": mean if low is None else low,
        "max": mean if high is None else high,
        "percentiles": percentiles,
    }


def report(successful: int = 7, errored: int = 1, incomplete: int = 2) -> dict[str, Any]:
    metrics = {
        "request_totals": {
            "successful": successful, "errored": errored, "incomplete": incomplete,
        },
        "output_token_count": {"successful": spread(32)},
        "prompt_token_count": {"successful": spread(128.5)},
        "output_tokens_per_second": {"successful": spread(20.0), "total": spread(24.0)},
        "requests_per_second": {"successful": spread(0.7), "total": spread(0.9)},
        "time_to_first_token_ms": {"successful": spread(100.0)},
        "inter_token_latency_ms": {"successful": spread(30.0)},
    }  # fmt: skip
    failed = [{"info": {"error": "401 Unauthorized\nmore"}}] * errored
    return {"benchmarks": [{"metrics": metrics, "requests": {"errored": failed}}]}


def test_figures_are_taken_from_where_they_are_right() -> None:
    (level,) = parse(report(), LOAD)
    assert level.concurrency == 2
    reading = level.reading
    assert reading.output_tokens_per_s == 24.0  # with the tokens of requests that were cut off
    assert reading.request_per_s == 0.7  # completed ones only
    assert (reading.requests, reading.errors, reading.incomplete) == (7, 1, 2)
    assert reading.first_error == "401 Unauthorized"
    assert reading.ttft_ms.model_dump() == {"p50": 100.0, "p95": 200.0, "p99": 300.0}
    assert reading.itl_ms.p50 == 30.0
    assert reading.prompt_tokens == 128.5


def test_nothing_completed_is_an_error_with_the_reason() -> None:
    with pytest.raises(EngineError, match="concurrency 2: too slow: no request was completed"):
        parse(report(successful=0, errored=0), LOAD)
    with pytest.raises(EngineError, match=r"all 3 requests failed: 401 Unauthorized$"):
        parse(report(successful=0, errored=3), LOAD)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, None])
@pytest.mark.parametrize(
    "name", ["requests_per_second", "time_to_first_token_ms", "inter_token_latency_ms"]
)
def test_what_was_not_measured_is_never_a_number(name: str, bad: float | None) -> None:
    damaged = copy.deepcopy(report(errored=0))
    found = damaged["benchmarks"][0]["metrics"][name]["successful"]
    found["mean"] = bad
    found["percentiles"] = dict.fromkeys(("p50", "p95", "p99"), bad)
    with pytest.raises(EngineError, match="no request was completed"):
        parse(damaged, LOAD)


def test_answers_of_another_length_are_an_error() -> None:
    damaged = report()
    damaged["benchmarks"][0]["metrics"]["output_token_count"]["successful"] = spread(30, 12, 32)
    with pytest.raises(EngineError, match="answers of 12 to 32 tokens, expected 32"):
        parse(damaged, LOAD)


@pytest.mark.parametrize("stalls", [1, 2])
def test_guidellm_is_given_a_second_chance(
    stalls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs now and then, which can't be caused."""
    left = stalls
    told = report()

    class Process:
        exit_code = 0

        def wait(self, _limit: float) -> int:
            nonlocal left
            left -= 1
            if left >= 0:
                raise EngineError("guidellm has not ended")
            (tmp_path / "load.json").write_text(json.dumps(told))
            return 0

    monkeypatch.setattr(guidellm, "launched", lambda *_: nullcontext(Process()))
    (tmp_path / "tokenizer.json").write_text("{}")
    model = Variant("mine", tmp_path, "gptq", "w4g64", None)
    target = guidellm.Target("http://127.0.0.1:1", "key", "m", model)
    if stalls == 1:
        assert guidellm.drive(target, LOAD, tmp_path / "load")[0].reading.requests == 7
    else:
        with pytest.raises(EngineError, match="has not ended"):
            guidellm.drive(target, LOAD, tmp_path / "load")


def test_missing_level() -> None:
    load = Load((1, 4), 128, 32, 10, 2)
    with pytest.raises(EngineError, match="measured 1 of 2"):
        parse(report(), load)


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": ()},
        {"concurrency": (0, 1)},
        {"concurrency": (1, 1)},
        {"prompt_tokens": 0},
        {"output_tokens": 1},
        {"seconds": 0},
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        BenchOptions(**wrong)
