"""The times of single requests, out of a GuideLLM report, and which of them met an objective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.ledger.load import Percentiles, Slo

Outcome = Literal["completed", "failed", "cut off"]
_OUTCOMES: dict[str, Outcome] = {
    "successful": "completed",
    "errored": "failed",
    "incomplete": "cut off",
}


@dataclass(frozen=True)
class Request:
    """One request; times in seconds since the epoch, None where it did not get that far.

    ``due`` is when the load wanted it to be sent, ``sent`` when it was; in a closed loop the
    difference is the client's own work between two requests of a stream.
    """

    outcome: Outcome
    due: float
    sent: float | None
    first_token: float | None
    last_token: float | None
    output_tokens: int
    prompt_tokens: int | None
    cached_tokens: int | None
    """Tokens of the prompt that came from the server's cache; None where it does not say."""
    error: str | None = None

    def ttft_ms(self, start: float) -> float:
        """From ``start`` to the first token, for a request that has one."""
        assert self.first_token is not None
        return 1e3 * (self.first_token - start)

    @property
    def itl_ms(self) -> float:
        """The mean time between the tokens of a completed request."""
        assert self.first_token is not None
        assert self.last_token is not None
        return 1e3 * (self.last_token - self.first_token) / max(1, self.output_tokens - 1)

    def tokens_between(self, start: float, end: float) -> float:
        """How many of its tokens came in this time, if they came at equal distances."""
        if self.first_token is None or self.last_token is None or not self.output_tokens:
            return 0.0
        gap = (self.last_token - self.first_token) / max(1, self.output_tokens - 1)
        times = (self.first_token + gap * index for index in range(self.output_tokens))
        return float(sum(start <= time < end for time in times))


def requests(benchmark: dict[str, Any]) -> list[Request]:
    """All requests of one benchmark of a report, in the order in which they were due."""
    return sorted(_requests(benchmark), key=lambda request: request.due)


def _requests(benchmark: dict[str, Any]) -> Iterator[Request]:
    for status, outcome in _OUTCOMES.items():
        for entry in benchmark["requests"][status] or ():
            times, prompt = entry["info"]["timings"], entry["input_metrics"]
            error = entry["info"].get("error") if outcome == "failed" else None
            # A request that was cut off has no count of the server's: its pieces are tokens.
            tokens = entry["output_metrics"]["text_tokens"] or times["token_iterations"]
            yield Request(
                outcome,
                times["targeted_start"],
                times["request_start"],
                times["first_token_iteration"],
                times["last_token_iteration"],
                tokens or 0,
                prompt["text_tokens"],
                prompt.get("cached_tokens"),
                error and str(error).splitlines()[0][:300],
            )


def attained(found: Sequence[Request], slo: Slo) -> float | None:
    """Share of a closed loop's requests that met the objective; None where none was decided.

    Those that the end cut off are left out: when they would have ended is not known.
    """
    decided = [request for request in found if request.outcome != "cut off"]
    if not decided:
        return None
    met = (
        request.outcome == "completed"
        and request.sent is not None
        and slo.met_by(request.ttft_ms(request.sent), request.itl_ms)
        for request in decided
    )
    return sum(met) / len(decided)


def cached(found: Sequence[Request]) -> int | None:
    """Prompt tokens that came from a cache, of all together; None where the server is silent."""
    known = [request.cached_tokens for request in found if request.cached_tokens is not None]
    return sum(known) if known else None


def percentiles(values: Sequence[float]) -> Percentiles:
    """The smallest value that ``percent`` of the values do not exceed, as GuideLLM defines it."""
    ranked = sorted(values)

    def at(percent: int) -> float:
        return ranked[max(0, -(-percent * len(ranked) // 100) - 1)]

    return Percentiles(p50=at(50), p95=at(95), p99=at(99))
