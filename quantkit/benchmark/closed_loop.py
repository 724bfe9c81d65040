"""A closed loop's figures, out of GuideLLM's report."""

from __future__ import annotations

import math
from typing import Any

from quantkit.benchmark.loads import Times, Workload
from quantkit.benchmark.requests import attained, cached, requests
from quantkit.errors import EngineError
from quantkit.ledger.load import Percentiles, Reading, Slo


class TooSlow(EngineError):
    """No request was completed in the window."""


def closed_loop(
    benchmark: dict[str, Any], workload: Workload, times: Times, slo: Slo | None, where: str
) -> Reading:
    """GuideLLM's figures of a closed loop; raise EngineError where they say nothing."""
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    if totals["successful"] == 0:
        raise _nothing(where, benchmark, times)
    produced = metrics["output_token_count"]["successful"]
    if produced["min"] != workload.output_tokens or produced["max"] != workload.output_tokens:
        raise EngineError(
            f"{where}: answers of {produced['min']:.0f} to {produced['max']:.0f} tokens, expected "
            f"{workload.output_tokens} each; the server ignores ignore_eos or its context is short"
        )

    def number(value: Any) -> float:
        # GuideLLM writes 0 for a figure without a sample; none of these can be 0.
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise _nothing(where, benchmark, times)
        return float(value)

    def percentiles(name: str) -> Percentiles:
        found = metrics[name]["successful"]["percentiles"]
        return Percentiles(**{p: number(found[p]) for p in ("p50", "p95", "p99")})

    found = requests(benchmark)
    return Reading(
        seconds=times.window,
        output_tokens_per_s=number(metrics["output_tokens_per_second"]["total"]["mean"]),
        request_per_s=number(metrics["requests_per_second"]["successful"]["mean"]),
        ttft_ms=percentiles("time_to_first_token_ms"),
        itl_ms=percentiles("inter_token_latency_ms"),
        requests=totals["successful"],
        errors=totals["errored"],
        first_error=_first_error(benchmark),
        incomplete=totals["incomplete"],
        prompt_tokens=number(metrics["prompt_token_count"]["successful"]["mean"]),
        cached_tokens=cached(found),
        attained=attained(found, slo) if slo else None,
    )


def _nothing(where: str, benchmark: dict[str, Any], times: Times) -> EngineError:
    reason = _first_error(benchmark)
    if reason:
        count = len(benchmark["requests"]["errored"])
        return EngineError(f"{where}: all {count} requests failed: {reason}")
    return TooSlow(f"{where}: too slow: no request was completed in {times.window:.3g} s")


def _first_error(benchmark: dict[str, Any]) -> str | None:
    """Why the first of the failed requests failed; None where none did."""
    failed = benchmark["requests"]["errored"]
    if not failed:
        return None
    return str(failed[0]["info"].get("error") or "no reason given").splitlines()[0][:300]
