"""From repetitions to what the ledger says of each load."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median, stdev
from typing import Any

from quantkit.benchmark.loads import Closed, Load
from quantkit.benchmark.options import BenchOptions
from quantkit.benchmark.sweep import Found, pooled
from quantkit.benchmark.weights import Weights, weights
from quantkit.ledger.load import (
    Bandwidth,
    Bench,
    Goodput,
    MemoryBandwidth,
    Percentiles,
    RateBench,
    Reading,
    Spread,
)
from quantkit.models.engine_config import EngineConfig
from quantkit.models.variant import Model


@dataclass(frozen=True)
class Facts:
    """What holds for every load of one server."""

    engine: EngineConfig
    startup_seconds: float
    load_seconds: float | None
    peak_rss_bytes: int
    protocol: dict[str, Any]


def results(
    model: Model,
    facts: Facts,
    options: BenchOptions,
    bandwidth: MemoryBandwidth | None,
    readings: Mapping[Load, Sequence[Reading]],
    found: Found | None,
    cut: bool = False,
) -> tuple[list[Bench], list[RateBench], list[Goodput]]:
    """Of closed loops, of open loops, and of the search for the goodput. ``cut``: whether the
    budget did not allow all repetitions."""
    benches, rates, goodputs = [], [], []
    read = weights(model) if bandwidth else None
    for load, made in readings.items():
        both = {**asdict(facts), **summary(made), **_priced(made, options.price_per_hour)}
        both["changes"] = changes(made, options, cut=cut)
        if isinstance(load, Closed):
            share = _bandwidth(read, bandwidth, load.concurrency, made)
            benches.append(Bench(**both, concurrency=load.concurrency, bandwidth=share))
        else:
            rates.append(RateBench(**both, arrivals=load.arrivals, rate_per_s=load.rate_per_s))
    if found and options.slo:
        at_it = found.at_it
        speed = mean(one.output_tokens_per_s for one in at_it) if at_it else 0.0
        goodputs.append(
            Goodput(
                engine=facts.engine,
                slo=options.slo,
                arrivals=options.arrivals,
                rate_per_s=found.rate_per_s,
                attained=pooled(at_it) if at_it else None,
                output_tokens_per_s=speed,
                above_per_s=found.above_per_s,
                readings=list(found.readings),
                ended=found.ended,
                cost_per_million_tokens=cost(options.price_per_hour, speed),
                protocol=facts.protocol,
            )
        )
    return benches, rates, goodputs


def summary(readings: Sequence[Reading]) -> dict[str, Any]:
    """The fields of ``Delivered`` that follow from its repetitions alone."""

    def percentiles(times: Callable[[Reading], Percentiles]) -> Percentiles:
        return Percentiles(
            p50=median(times(one).p50 for one in readings),
            p95=median(times(one).p95 for one in readings),
            p99=median(times(one).p99 for one in readings),
        )

    joules = [
        one.joules / (one.output_tokens_per_s * one.seconds)
        for one in readings
        if one.joules is not None
    ]
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
        "attained": _median([one.attained for one in readings]),
        "client_cpu": _median([one.client_cpu for one in readings]),
        "client_bound": any(one.client_bound for one in readings),
        "joules_per_token": _median(joules),
        "repetitions": list(readings),
    }


def changes(readings: Sequence[Reading], options: BenchOptions, *, cut: bool) -> list[str]:
    """How the windows of one load differ from what was asked for, in words."""
    asked, windows = options.times.window, [one.seconds for one in readings]
    budget = f"to stay within the budget of {options.budget_seconds or 0:.3g} s"
    found = []
    if max(windows) > 1.001 * asked:
        found.append(
            f"windows of up to {max(windows):.3g} s instead of {asked:.3g} s, because requests "
            "take long here"
        )
    if min(windows) < 0.999 * asked:
        found.append(f"windows from {min(windows):.3g} s instead of {asked:.3g} s, {budget}")
    if cut and len(readings) < options.repetitions:
        found.append(f"{len(readings)} of {options.repetitions} repetitions, {budget}")
    return found


def spread(values: Sequence[float]) -> Spread:
    """How far the repetitions of one figure lie apart."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) >= 3 else None
    return Spread(low=min(values), high=max(values), stderr=error)


def cost(price_per_hour: float | None, output_tokens_per_s: float) -> float | None:
    """The price of a million output tokens, in the currency of ``price_per_hour``."""
    if price_per_hour is None or output_tokens_per_s <= 0:
        return None
    return price_per_hour / 3600 / output_tokens_per_s * 1e6


def bandwidth_share(
    read: Weights,
    machine: MemoryBandwidth,
    concurrency: int,
    output_tokens_per_s: float,
    itl_ms: float,
) -> Bandwidth:
    """See ``Bandwidth``: a step reads the weights once and gives each request a token."""
    step = read.step_bytes(concurrency)
    each = step / concurrency
    limit = machine.read_bytes_per_s
    return Bandwidth(
        step_bytes=step,
        bytes_per_token=each,
        share=each * output_tokens_per_s / limit,
        decode_share=step / (itl_ms / 1e3) / limit,
    )


def _bandwidth(
    read: Weights | None,
    machine: MemoryBandwidth | None,
    concurrency: int,
    readings: Sequence[Reading],
) -> Bandwidth | None:
    if read is None or machine is None:
        return None
    speed = median(one.output_tokens_per_s for one in readings)
    itl = median(one.itl_ms.p50 for one in readings)
    return bandwidth_share(read, machine, concurrency, speed, itl)


def _priced(readings: Sequence[Reading], price_per_hour: float | None) -> dict[str, Any]:
    speed = median(one.output_tokens_per_s for one in readings)
    return {"cost_per_million_tokens": cost(price_per_hour, speed)}


def _median(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return median(found) if found else None
