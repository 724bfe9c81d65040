"""One server under one load after the other, each repetition kept as soon as it was made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, Protocol, TypeVar

from quantkit.benchmark import sweep
from quantkit.benchmark.budget import Budget
from quantkit.benchmark.closed_loop import TooSlow
from quantkit.benchmark.generator import LoadGenerator
from quantkit.benchmark.loads import Closed, Load, Open, Times
from quantkit.benchmark.open_loop import Overloaded
from quantkit.benchmark.options import BenchOptions
from quantkit.engines.process import Process
from quantkit.errors import EngineError
from quantkit.ledger.load import RateReading, Reading
from quantkit.system.progress import say

T = TypeVar("T")

_STEP = 2.0
"""The factor by which a window in which nothing was completed is extended."""
_STEPS = 4
"""How often; where there is a budget, as often as it allows."""
_REQUESTS_TO_JUDGE = 20
"""Requests that a reading of the goodput search should have; it is extended for them up to four
times."""
_ROOM = 1.2
"""A window that a budget shrinks still lasts this many times as long as a request."""
_SHORTEST = 1.0
"""Seconds of a window that a budget shrinks, unless a shorter one was asked for."""


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.readings: dict[Load, list[Reading]] = {}
        self.found: sweep.Found | None = None
        self.error: str | None = None
        """The first one."""
        self.cut = False
        """Whether the budget did not allow all repetitions."""
        self._long_enough: dict[Load, Times] = {}
        self._too_slow: set[Load] = set()
        self._generator = generator
        self._server = server
        self._options = options
        self._key = key
        self._keep = keep
        self._clock = clock
        # Half of it for the search, where there is one.
        given = options.budget_seconds
        self._budget = Budget(given / 2 if given and options.slo else given, clock)

    def measure_all(self) -> None:
        """Measure everything that the options ask for, while the server lives and the budget
        lasts."""
        levels = self._options.concurrency
        rates = [Open(rate, self._options.arrivals) for rate in self._options.rates]
        try:
            if levels is None:
                levels = tuple(sweep.doubling(self._throughput, lambda: self._budget.left > 0))
            loads: list[Load] = [*map(Closed, levels), *rates]
            everything = [(load, n) for n in range(self._options.repetitions) for load in loads]
            for done, (load, repetition) in enumerate(everything):
                ahead = [later for later, _ in everything[done + 1 :]]
                if not self._repetition(load, repetition, ahead):
                    say(f"the budget of {self._budget.seconds:.3g} s is spent: no more repetitions")
                    self.cut = True
                    break
            if self._options.slo:
                self._search(self._options.slo.share)
        except EngineError as error:
            self._note(error)

    def _throughput(self, level: int) -> float:
        # As much again is kept for the levels that may follow.
        self._repetition(Closed(level), 0, [Closed(level)])
        found = self.readings.get(Closed(level), ())
        return max((one.output_tokens_per_s for one in found), default=0.0)

    def _repetition(self, load: Load, repetition: int, ahead: Sequence[Load]) -> bool:
        """Measure it unless it was; an error is noted, and passed on where the server ended.

        False where the budget does not allow it; the first one of each load is always made. A
        window in which nothing is completed is extended, and what was long enough then holds for
        the load. ``ahead``: what is to be measured later.
        """
        if len(self.readings.get(load, ())) > repetition or load in self._too_slow:
            return True
        wanted, why = self._wanted(load)
        least, later = self._least(load), [self._wanted(one)[0] for one in ahead]
        times: Times | None
        if load in self.readings:
            times = self._budget.another(wanted, least, later)
        else:
            times = self._budget.first(wanted, least, later, self._options.times)
        if times is None:
            return False
        if times.window < wanted.window:
            limit = f"the budget of {self._budget.seconds:.3g} s"
            shrunk = times.window < self._options.times.window
            why = f" to stay within {limit}" if shrunk else f"{why}, as far as {limit} allows"
        self._measure(load, repetition, times, why)
        return True

    def _measure(self, load: Load, repetition: int, times: Times, why: str) -> None:
        asked = self._options.times.window
        reason = "" if math.isclose(times.window, asked) else f" instead of {asked:.3g} s{why}"
        say(f"{load}: window of {times.window:.3g} s{reason}, repetition {repetition + 1}")
        for step in count():
            started = self._clock()
            try:
                reading = self._reading(load, repetition, times, self._options.times)
            except EngineError as error:
                if self._server.exit_code is not None:
                    raise
                longer = self._budget.longer(times, _STEP, first=load not in self.readings)
                last = self._budget.seconds is None and step == _STEPS
                if not isinstance(error, TooSlow):
                    self._note(error)
                    return
                if last or longer is None:
                    self._too_slow.add(load)
                    if load in self.readings and self._budget.seconds is not None:
                        say(f"{load}: slow machine: no more repetitions within the budget")
                        self.cut = True
                    else:
                        self._note(EngineError(f"{error}; {self._what_to_do}"))
                    return
                say(
                    f"{load}: slow machine: no request was completed in {times.window:.3g} s; "
                    f"window extended to {longer.window:.3g} s"
                )
                times = longer
            else:
                self._budget.note(times, self._clock() - started)
                if step:
                    self._long_enough[load] = times
                self.readings.setdefault(load, []).append(reading)
                return

    @property
    def _what_to_do(self) -> str:
        """Where nothing was completed in the longest window that there is time for."""
        if self._budget.seconds is None:
            return "give it more seconds or fewer output tokens"
        return (
            f"that is what the budget of {self._budget.seconds:.3g} s allows: "
            "raise budget_seconds or ask for fewer output tokens"
        )

    def _wanted(self, load: Load) -> tuple[Times, str]:
        """As asked for, or longer where requests are, and then why: at a high concurrency each
        takes its time.

        Two of the longest are measured after half of one.
        """
        asked = self._options.times
        if load in self._long_enough:
            return self._long_enough[load], ", which was too short"
        most = self._longest_request(load, below=True)
        if most is None or 2 * most <= asked.window:
            return asked, ""
        why = f" because a request may take {most:.3g} s"
        return Times(max(asked.warmup, most / 2), 2 * most), why

    def _least(self, load: Load) -> float:
        """Seconds that a window needs so that requests are completed in it, as far as is known."""
        asked = self._options.times.window
        most = self._longest_request(load)
        return asked if most is None else max(_ROOM * most, min(asked, _SHORTEST))

    def _longest_request(self, load: Load, *, below: bool = False) -> float | None:
        """Seconds that a request of a closed loop may take; None where nothing is known yet.

        What one took with fewer at a time, times how many more there are, is the most that it can
        take where the engine is saturated. ``below``: only by what was measured with fewer.
        """
        if not isinstance(load, Closed):
            return None
        known = {
            other.concurrency: found[0]
            for other, found in self.readings.items()
            if isinstance(other, Closed) and other.concurrency < load.concurrency + (not below)
        }
        if not known:
            return None
        level = max(known)
        tokens = self._options.workload.output_tokens
        took = (known[level].ttft_ms.p50 + known[level].itl_ms.p50 * (tokens - 1)) / 1e3
        return round(took * load.concurrency / level, 1)

    def _search(self, share: float) -> None:
        given = self._options.budget_seconds
        self._budget = Budget(given / 2 if given else None, self._clock)
        answered = [one.request_per_s for found in self.readings.values() for one in found]
        first = max(answered, default=2.0) / 2
        self.found = sweep.goodput(self._attained, share, first, self._options.repetitions)

    def _attained(self, rate: float, repetition: int) -> RateReading:
        if not self._budget.left:
            raise sweep.BudgetSpent
        window = self._options.times.window
        window = max(window, min(_REQUESTS_TO_JUDGE / rate, 4 * window))
        times = Times(self._options.times.warmup, window)
        load = Open(rate, self._options.arrivals)
        say(f"{load}: window of {window:.3g} s, repetition {repetition + 1}")
        try:
            reading = self._reading(load, repetition, times, times)
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

    def _reading(self, load: Load, repetition: int, times: Times, asked: Times) -> Reading:
        """A window as long as ``times``; kept under what was ``asked`` for, however long it is."""
        make = partial(self._generator.measure, load, times)
        if self._keep is None:
            reading = make()
        else:
            key = [self._key, load.protocol(), asked.protocol(), repetition]
            reading = self._keep("load", key=key, make=make, shape=Reading)
        if reading.cached_tokens and not self._options.prefix_cache:
            raise EngineError(
                f"bench at {load}: the server took {reading.cached_tokens} prompt tokens from a "
                "prefix cache that should be off; its figures would be for less work"
            )
        return reading

    def _note(self, error: EngineError) -> None:
        say(str(error))
        self.error = self.error or str(error)
