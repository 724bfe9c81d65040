"""What a ledger records of load: what an engine delivered while requests kept coming.

Two kinds of load, which answer two questions. In a closed loop (``Bench``) a fixed number of
clients each send their next request when the last was answered: how much can the engine do? In an
open loop (``RateBench``) requests come at their own times, however long answers take: how long do
people wait? ``Goodput`` is the highest rate of the second kind that an objective allows.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantkit.errors import RecipeError
from quantkit.models.engine_config import EngineConfig

Arrivals = Literal["constant", "poisson"]
"""How requests of an open loop come: at equal distances, or independently of each other."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Percentiles(_Entry):
    """Percentiles of latencies, in milliseconds."""

    p50: float
    p95: float
    p99: float


class Slo(_Entry):
    """A service level objective: ``share`` of the requests must be as fast as this.

    A request meets it where its time to the first token and its mean time between tokens are both
    within the limits; one that failed, or that was not answered in time, does not.
    """

    ttft_ms: float | None = Field(None, gt=0)
    """Longest time to the first token, in milliseconds; null: no limit."""
    itl_ms: float | None = Field(None, gt=0)
    """Longest mean time between tokens of an answer, in milliseconds; null: no limit."""
    share: float = Field(0.95, gt=0, le=1)
    """Share of the requests that must meet it."""

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.ttft_ms is None and self.itl_ms is None:
            raise ValueError("an objective needs ttft_ms or itl_ms, or both")
        return self

    @classmethod
    def parse(cls, text: str) -> Self:
        """``ttft_ms=500,itl_ms=50``, as a command line has it; raise RecipeError for others."""
        pairs = [part.partition("=") for part in text.split(",")]
        try:
            return cls.model_validate({key.strip(): value for key, _, value in pairs})
        except ValidationError as error:
            raise RecipeError(
                f"--slo {text!r}: {error.errors()[0]['msg']}; expected ttft_ms=500,itl_ms=50"
            ) from error

    def met_by(self, ttft_ms: float, itl_ms: float) -> bool:
        """Whether a completed request with these times meets the objective."""
        limits = ((ttft_ms, self.ttft_ms), (itl_ms, self.itl_ms))
        return all(limit is None or time <= limit for time, limit in limits)


class Reading(_Entry):
    """One repetition of one load: a window after a warm-up of its own."""

    seconds: float
    """How long the window was."""
    output_tokens_per_s: float
    """Tokens of all requests, including those that the window's end cut off."""
    request_per_s: float
    """Completed ones."""
    ttft_ms: Percentiles
    itl_ms: Percentiles
    """One mean a request; both over completed requests."""
    requests: int
    """Completed."""
    errors: int = 0
    first_error: str | None = None
    """Why the first of them failed."""
    incomplete: int = 0
    """Still running when the time was up: cut off, not failed."""
    prompt_tokens: float
    """Mean length of the prompts as the server counted it."""
    attained: float | None = None
    """Share of the requests that met the objective, where there is one."""
    cached_tokens: int | None = None
    """Prompt tokens that the server says it took from a cache; None where it does not say."""
    client_cpu: float | None = None
    """Cores that the load generator took; None where it could not be watched."""
    client_busy: float | None = None
    """Share of the time that its busiest process computed, or was ready and had no core."""
    client_bound: bool = False
    """The load generator was the bottleneck."""
    joules: float | None = None
    """That the machine took, where it can be read."""


class Spread(_Entry):
    """The spread of the repetitions around their median."""

    low: float
    high: float
    stderr: float | None
    """Standard error of the repetitions' mean; None for fewer than three."""


class Bandwidth(_Entry):
    """How near decoding came to the physical limit: memory that can be read only so fast.

    A step of decoding reads every weight but the embedding's rows once, whatever the number of
    requests that it serves.
    """

    step_bytes: int
    """Bytes of weights that one step reads."""
    bytes_per_token: float
    """``step_bytes`` divided by the requests that share a step, the concurrency."""
    share: float
    """``bytes_per_token`` x ``output_tokens_per_s`` of the machine's ``read_bytes_per_s``; the
    time that prompts take is in it."""
    decode_share: float
    """The same while tokens are written: ``step_bytes`` / median ITL."""


class Delivered(_Entry):
    """What one engine delivered under one load.

    Throughputs, latencies and shares are medians over ``repetitions``; counts are their sums.
    """

    engine: EngineConfig
    output_tokens_per_s: float
    request_per_s: float
    ttft_ms: Percentiles
    itl_ms: Percentiles
    throughput_spread: Spread
    """The spread of ``output_tokens_per_s``."""
    ttft_spread: Spread
    """The spread of the median time to the first token, ms."""
    itl_spread: Spread
    """The spread of the median inter-token latency, ms."""
    requests: int
    """Completed."""
    errors: int
    first_error: str | None = None
    """Why the first of them failed."""
    incomplete: int = 0
    """Still running when the time was up: cut off, not failed."""
    attained: float | None = None
    """Share of requests that met ``protocol["slo"]``; None where there is no objective."""
    client_cpu: float | None = None
    """Cores that the load generator took, on the machine that the engine ran on."""
    client_bound: bool = False
    """In any repetition the load generator was the bottleneck: the engine may be faster than these
    figures."""
    joules_per_token: float | None = None
    """Energy of the machine by output token; None where it exposes none."""
    cost_per_million_tokens: float | None = None
    """The price of a million output tokens at the recipe's ``price_per_hour``, in its currency."""
    startup_seconds: float
    """From launching the server until it answers."""
    load_seconds: float | None = None
    """Seconds of these spent reading the weights, by the engine's log; None where it does not
    say."""
    peak_rss_bytes: int
    """Peak of the summed resident memory of the server's process tree."""
    repetitions: list[Reading] = Field(min_length=1)
    changes: list[str] = Field(default_factory=list)
    """How windows and repetitions differ from what was asked for, and why, in words."""
    protocol: dict[str, Any]
    """Workload, seconds, repetitions asked for, objective, load generator and its version, the
    server's arguments with the slots and context that it was given."""


class Bench(Delivered):
    """In a closed loop: ``concurrency`` requests at a time, the next when one is answered."""

    concurrency: int
    bandwidth: Bandwidth | None = None
    """None where the machine's bandwidth or the weights' layout is not known."""


class RateBench(Delivered):
    """In an open loop: ``rate_per_s`` requests a second on average, answered or not."""

    arrivals: Arrivals
    rate_per_s: float
    """Asked for; ``request_per_s`` is what was completed."""


class RateReading(_Entry):
    """One step of the search for the goodput: the rate that was tried, and how it went."""

    rate_per_s: float
    requests: int
    """That were sent in the window, all of them: those unfinished or failed did not attain."""
    attained: float
    """Share of ``requests`` that met the objective."""
    output_tokens_per_s: float
    client_bound: bool = False


class Goodput(_Entry):
    """The highest rate at which the objective was attained, by a bracketing search."""

    engine: EngineConfig
    slo: Slo
    arrivals: Arrivals
    rate_per_s: float
    """0 where even the lowest rate tried did not attain it."""
    attained: float | None
    """At that rate; None where it is 0."""
    output_tokens_per_s: float
    """At that rate; 0 where it is 0."""
    above_per_s: float | None
    """The lowest rate that did not attain it: the goodput lies below. None where none failed."""
    readings: list[RateReading]
    """In the order in which they were tried."""
    ended: str
    """Why the search ended, in words."""
    cost_per_million_tokens: float | None = None
    """The price of a million output tokens at that rate, at the recipe's ``price_per_hour``."""
    protocol: dict[str, Any]


class MemoryBandwidth(_Entry):
    """How fast all cores together move memory, measured once per machine: bytes a second.

    As STREAM counts: a copy moves each byte twice, a triad three arrays.
    """

    read_bytes_per_s: float
    copy_bytes_per_s: float
    triad_bytes_per_s: float
    threads: int
    array_bytes: int
    """Bytes of each array: far more than the caches hold."""
