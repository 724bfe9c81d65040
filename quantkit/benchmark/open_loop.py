"""An open loop's figures: of the requests that were due in its window, however late answered."""

from __future__ import annotations

from typing import Any

from quantkit.benchmark.loads import Times, Workload
from quantkit.benchmark.requests import cached, percentiles, requests
from quantkit.errors import EngineError
from quantkit.ledger.load import Reading, Slo


class Overloaded(EngineError):
    """None of the ``requests`` that were due was answered in time: the rate is far too high."""

    def __init__(self, where: str, requests: int) -> None:
        super().__init__(
            f"{where}: too slow: none of {requests} requests was answered in time; lower the rate"
        )
        self.requests = requests


def open_loop(
    benchmark: dict[str, Any], workload: Workload, times: Times, slo: Slo | None, where: str
) -> tuple[Reading, float]:
    """Judge the requests of the window; the second value is how late the client sent them, in
    seconds, all but the latest 5 %.

    Time to the first token counts from when a request was due. One that failed, or that was not
    answered when the load ended, which is as long after as the objective allows, missed it.
    Raise EngineError where none was due or all failed, or an answer has another length, and
    Overloaded where none was answered.
    """
    found = requests(benchmark)
    start = benchmark["scheduler_metrics"]["start_time"] + times.warmup
    end = start + times.window
    window = [request for request in found if start <= request.due < end]
    completed = [request for request in window if request.outcome == "completed"]
    errors = [request.error for request in window if request.outcome == "failed"]
    if not window:
        raise EngineError(
            f"{where}: no request was due in the {times.window:g} s; give it more seconds"
        )
    if not completed:
        if errors:
            raise EngineError(f"{where}: all {len(window)} requests failed: {errors[0]}")
        raise Overloaded(where, len(window))
    other = [r.output_tokens for r in completed if r.output_tokens != workload.output_tokens]
    if other:
        raise EngineError(
            f"{where}: an answer of {other[0]} tokens, expected {workload.output_tokens}; the "
            "server ignores ignore_eos or its context is short"
        )
    ttft = [request.ttft_ms(request.due) for request in completed]
    itl = [request.itl_ms for request in completed]
    met = [slo.met_by(*pair) for pair in zip(ttft, itl, strict=True)] if slo else []
    lengths = [r.prompt_tokens for r in completed if r.prompt_tokens is not None]
    late = sorted(r.sent - r.due for r in window if r.sent is not None)
    reading = Reading(
        seconds=times.window,
        output_tokens_per_s=sum(r.tokens_between(start, end) for r in found) / times.window,
        request_per_s=len(completed) / times.window,
        ttft_ms=percentiles(ttft),
        itl_ms=percentiles(itl),
        requests=len(completed),
        errors=len(errors),
        first_error=errors[0] if errors else None,
        incomplete=len(window) - len(completed) - len(errors),
        prompt_tokens=sum(lengths) / len(lengths),
        cached_tokens=cached(completed),
        attained=sum(met) / len(window) if slo else None,
    )
    return reading, late[int(0.95 * (len(late) - 1))] if late else 0.0
