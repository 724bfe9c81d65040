"""From the repetitions of one load to what the ledger says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median, stdev
from typing import Any

from quantkit.load import Percentiles, Reading, Spread


def summary(readings: Sequence[Reading]) -> dict[str, Any]:
    """The fields of ``Delivered`` that follow from its repetitions alone."""

    def over(figure: Callable[[Reading], float | None]) -> float | None:
        found = [value for value in map(figure, readings) if value is not None]
        return median(found) if found else None

    def percentiles(times: Callable[[Reading], Percentiles]) -> Percentiles:
        return Percentiles(
            p50=median(times(one).p50 for one in readings),
            p95=median(times(one).p95 for one in readings),
            p99=median(times(one).p99 for one in readings),
        )

    return {
        "output_tokens_per_s": median(one.output_tokens_per_s for one in readings),
        "request_per_s": median(one.request_per_s for one in readings),
        "ttft_ms": percentiles(lambda one: one.ttft_ms),
        "itl_ms": percentiles(lambda one: one.itl_ms),
        "throughput_spread": spread([one.output_tokens_per_s for one in readings]),
        "ttft_spread": spread([one.ttft_ms.p50 for one in readings]),
        "itl_spread": spread([one.itl_ms.p50 for one in readings]),
        "requests": sum(one.requests for one in readings),
        "errors": sum(one.errors for one in readings),
        "first_error": next((one.first_error for one in readings if one.first_error), None),
        "incomplete": sum(one.incomplete for one in readings),
        "attained": over(lambda one: one.attained),
        "repetitions": list(readings),
    }


def spread(values: Sequence[float]) -> Spread:
    """How far the repetitions of one figure lie apart."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) >= 3 else None
    return Spread(low=min(values), high=max(values), stderr=error)
