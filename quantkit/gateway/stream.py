"""The events of a stream: passed on whole, timed, and searched for the count of tokens."""

from __future__ import annotations

import json
from typing import Any

from quantkit.gateway.answers import END
from quantkit.gateway.metrics import Meters

_LONGEST_EVENT = 1 << 20
"""Bytes; more without an end is passed on as it is."""


class Events:
    """Cuts what an engine sends into whole events, so that an error can follow any of them."""

    def __init__(self, began: float, meters: Meters) -> None:
        self.first: float | None = None
        """Seconds from ``began`` to the first event."""
        self.count = 0
        """The number of events, not counting the end of the stream."""
        self._began = self._last = began
        self._meters = meters
        self._rest = b""
        self._before = self._latest = b""

    def feed(self, data: bytes, now: float) -> bytes:
        """The events that are complete now."""
        data = self._rest + data if self._rest else data
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4 if b"\r" in data else 0)
        if end == 1:
            end = len(data) if len(data) > _LONGEST_EVENT else 0
        self._rest, whole = data[end:], data[:end]
        events = whole.count(b"\ndata: ") + whole.startswith(b"data: ")
        if events:
            self._before, self._latest = self._latest, whole
            if count := events - whole.rstrip().endswith(END.strip()):
                self._time(now, count)
        return whole

    @property
    def ended(self) -> bool:
        """Whether the last event was an end, or an error of the engine's own."""
        return END.strip() in self._last_events() or self.failed

    @property
    def failed(self) -> bool:
        """Whether the engine ended the stream with an error of its own."""
        return any(b'"error"' in event[:20] for event in self._last_events()[-3:])

    def usage(self) -> tuple[int, int]:
        """Tokens of prompt and answer, as the last events say; else events count as tokens."""
        for event in reversed(self._last_events()):
            if event.startswith(b"data: {"):
                try:
                    found = usage(json.loads(event[6:]))
                except ValueError:
                    continue
                if found is not None:
                    return found
        return 0, self.count

    def _last_events(self) -> list[bytes]:
        return (self._before + self._latest).replace(b"\r\n", b"\n").split(b"\n\n")

    def _time(self, now: float, count: int) -> None:
        if self.first is None:
            self.first = now - self._began
            self._meters.ttft.observe(self.first)
            between = count - 1
        else:
            between = count
        for _ in range(between):
            self._meters.itl.observe((now - self._last) / count)
        self.count += count
        self._last = now


def usage(answer: Any) -> tuple[int, int] | None:
    """Tokens of prompt and answer out of ``usage``, or out of llama-server's ``timings``, which
    tell apart what of the prompt was computed and what was there already."""
    if not isinstance(answer, dict):
        return None
    for key, of_prompt, of_answer in (
        ("usage", ("prompt_tokens",), "completion_tokens"),
        ("timings", ("prompt_n", "cache_n"), "predicted_n"),
    ):
        found = answer.get(key)
        if isinstance(found, dict):
            counts = [found.get(name) for name in (of_answer, *of_prompt)]
            if all(isinstance(count, int) for count in counts):
                return sum(counts[1:]), counts[0]  # type: ignore[arg-type,return-value]
    return None
