"""GuideLLM reports for tests: made up, with what is read of them."""

from __future__ import annotations

from typing import Any

_STATUS = {"completed": "successful", "failed": "errored", "cut off": "incomplete"}


def spread(mean: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """A GuideLLM distribution."""
    percentiles = {"p50": mean, "p95": mean * 2, "p99": mean * 3}
    return {
        "mean": mean,
        "min": mean if low is None else low,
        "max": mean if high is None else high,
        "percentiles": percentiles,
    }


def closed(successful: int = 7, errored: int = 1, incomplete: int = 2) -> dict[str, Any]:
    """One benchmark of a closed loop: its figures, and of its requests only the failed ones."""
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
    failed = [request(0.0, outcome="failed", error="401 Unauthorized\nmore")] * errored
    return {"metrics": metrics, **with_requests(failed)}


def request(
    due: float,
    *,
    late: float = 0.0,
    ttft: float = 0.1,
    itl: float = 0.02,
    tokens: int = 3,
    outcome: str = "completed",
    error: str | None = None,
    cached: int | None = None,
) -> dict[str, Any]:
    """One request, ``ttft`` counted from when it was due, ``late`` when it was sent; seconds."""
    came = outcome == "completed"
    return {
        "outcome": outcome,
        "info": {
            "error": error,
            "timings": {
                "targeted_start": due,
                "request_start": due + late,
                "first_token_iteration": due + ttft if came else None,
                "last_token_iteration": due + ttft + itl * (tokens - 1) if came else None,
                "token_iterations": tokens if came else 0,
            },
        },
        "input_metrics": {"text_tokens": 64, "cached_tokens": cached},
        "output_metrics": {"text_tokens": tokens if came else None},
    }


def with_requests(found: list[dict[str, Any]], start: float = 0.0) -> dict[str, Any]:
    """A benchmark's list of requests by how they ended, and when the load began."""
    return {
        "requests": {
            status: [one for one in found if one["outcome"] == outcome]
            for outcome, status in _STATUS.items()
        },
        "scheduler_metrics": {"start_time": start},
    }
