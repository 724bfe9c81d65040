"""One server under one load after the other, each repetition kept as soon as it was made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from quantkit.bench import sweep
from quantkit.bench.closed_loop import TooSlow
from quantkit.bench.generator import LoadGenerator
from quantkit.bench.loads import Closed, Load, Open, Times
from quantkit.bench.open_loop import Overloaded
from quantkit.bench.options import BenchOptions
from quantkit.engines.process import Process
from quantkit.errors import EngineError
from quantkit.ledger.load import RateReading, Reading
from quantkit.progress import say

T = TypeVar("T")

_PATIENCE = (1, 4, 16)
_REQUESTS_TO_JUDGE = 20
"""A reading of the search for the goodput is long enough for so many, up to four times as long."""


class Keep(Protocol):
    """``make()``, or what it gave before for the same ``kind`` and ``key``."""

    def __call__(self, kind: str, *, key: Any, make: Callable[[], T], shape: type[T]) -> T:
        """``kind``: part of a file's name; ``shape``: what the stored JSON is read as."""
        ...


class Session:
    """One server under one load after the other."""

    def __init__(
        self,
        generator: LoadGenerator,
        server: Process,
        options: BenchOptions,
        key: dict[str, Any],
        keep: Keep | None,
    ) -> None:
        self.readings: dict[Load, list[Reading]] = {}
        self.found: sweep.Found | None = None
        self.error: str | None = None
        """The first one."""
        self._long_enough: dict[Load, Times] = {}
        self._generator = generator
        self._server = server
        self._options = options
        self._key = key
        self._keep = keep

    def measure_all(self) -> None:
        """Everything that the options ask for, as far as the server lives."""
        levels = self._options.concurrency
        rates = [Open(rate, self._options.arrivals) for rate in self._options.rates]
        try:
            if levels is None:
                levels = tuple(sweep.doubling(self._throughput))
            loads: list[Load] = [*map(Closed, levels), *rates]
            for repetition in range(self._options.repetitions):
                for load in loads:
                    self._repetition(load, repetition)
            if self._options.slo:
                self._search(self._options.slo.share)
        except EngineError as error:
            self._note(error)

    def _throughput(self, level: int) -> float:
        self._repetition(Closed(level), 0)
        found = self.readings.get(Closed(level), ())
        return max((one.output_tokens_per_s for one in found), default=0.0)

    def _repetition(self, load: Load, repetition: int) -> None:
        """Measure it unless it was; an error is noted, and passed on where the server ended.

        A window in which nothing is completed is tried again four and sixteen times as long, and
        what was long enough then holds for the load.
        """
        if len(self.readings.get(load, ())) > repetition:
            return
        times = self._long_enough.get(load) or self._times(load)
        for patience in _PATIENCE:
            tried = times.longer(patience)
            try:
                reading = self._reading(load, repetition, tried)
            except EngineError as error:
                if self._server.exit_code is not None:
                    raise
                if not isinstance(error, TooSlow) or patience == _PATIENCE[-1]:
                    self._note(error)
                    return
                say(str(error))
            else:
                self._long_enough[load] = tried
                self.readings.setdefault(load, []).append(reading)
                return

    def _times(self, load: Load) -> Times:
        """As asked for, or longer where requests are: at a high concurrency each takes its time.

        What a request took with fewer at a time, times how many more there are, is the most that
        it can take where the engine is saturated; two such are measured after half of one.
        """
        asked = self._options.times
        lower = [
            (other.concurrency, found[0])
            for other, found in self.readings.items()
            if isinstance(load, Closed)
            and isinstance(other, Closed)
            and other.concurrency < load.concurrency
        ]
        if not isinstance(load, Closed) or not lower:
            return asked
        level, reading = max(lower, key=lambda pair: pair[0])
        tokens = self._options.workload.output_tokens
        took = (reading.ttft_ms.p50 + reading.itl_ms.p50 * (tokens - 1)) / 1e3
        most = round(took * load.concurrency / level, 1)
        return Times(max(asked.warmup, most / 2), max(asked.window, 2 * most))

    def _search(self, share: float) -> None:
        answered = [one.request_per_s for found in self.readings.values() for one in found]
        first = max(answered, default=2.0) / 2
        self.found = sweep.goodput(self._attained, share, first, self._options.repetitions)

    def _attained(self, rate: float, repetition: int) -> RateReading:
        window = self._options.times.window
        window = max(window, min(_REQUESTS_TO_JUDGE / rate, 4 * window))
        times = Times(self._options.times.warmup, window)
        try:
            reading = self._reading(Open(rate, self._options.arrivals), repetition, times)
        except Overloaded as error:
            return RateReading(
                rate_per_s=rate, requests=error.requests, attained=0.0, output_tokens_per_s=0.0
            )
        return RateReading(
            rate_per_s=rate,
            requests=reading.requests + reading.errors + reading.incomplete,
            attained=reading.attained or 0.0,
            output_tokens_per_s=reading.output_tokens_per_s,
            client_bound=reading.client_bound,
        )

    def _reading(self, load: Load, repetition: int, times: Times) -> Reading:
        say(f"{load}, {times.window:.3g} s, repetition {repetition + 1}")
        make = partial(self._generator.measure, load, times)
        if self._keep is None:
            reading = make()
        else:
            key = [self._key, load.protocol(), times.protocol(), repetition]
            reading = self._keep("load", key=key, make=make, shape=Reading)
        if reading.cached_tokens and not self._options.prefix_cache:
            raise EngineError(
                f"bench at {load}: the server took {reading.cached_tokens} prompt tokens from a "
                "cache that was to be off; its figures would be those of less work"
            )
        return reading

    def _note(self, error: EngineError) -> None:
        say(str(error))
        self.error = self.error or str(error)
