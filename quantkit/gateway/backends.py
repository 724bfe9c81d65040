"""Where requests are computed: an engine on this machine, or another server."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass

from quantkit.gateway.answers import NotTaken, Unreachable
from quantkit.gateway.config import Backend


@dataclass(frozen=True)
class Upstream:
    """Where to send a request: ``url`` without ``/v1``."""

    url: str
    key: str | None
    model: str


class Serving(ABC):
    """What the two kinds have in common: the count of requests, and its bound."""

    engine: str
    """``llamacpp``, ``vllm`` or ``remote``."""
    sums_choices = True
    """Whether ``usage`` in its answers is of all choices."""
    renders_chats = True
    """Whether it can be asked by messages; of another server, that is its own to say."""
    attempts = 1
    """How often a request is offered to it that it did not take."""
    seconds_down = 5.0
    """Seconds for which a backend that could not be reached is asked last."""

    def __init__(self, name: str, section: Backend) -> None:
        self.name = name
        self.section = section
        self.requests = 0
        """Taken and not finished."""
        self.using = 0
        """Those of them that were sent on."""
        self._seconds = 1.0
        """What a usual request takes."""
        self._down_until = 0.0

    @property
    def down(self) -> bool:
        """Whether it could not be reached just now."""
        return time.monotonic() < self._down_until

    @property
    def load(self) -> tuple[bool, float]:
        """Sort key: backends that are down come last, then by requests per slot."""
        return self.down, self.requests / self.section.slots

    @property
    def full(self) -> bool:
        """Whether one more request would be one too many."""
        return self.requests >= self.section.slots + self.section.queue

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Upstream]:
        """Hold it for one request. Raise NotTaken: 429 where the queue is full, 503 where the
        engine is not to be had."""
        if self.full:
            raise NotTaken(
                429,
                f"{self.name}: {self.requests} requests are running or waiting already",
                retry_after=min(30.0, self._seconds),
            )
        self.requests += 1
        try:
            upstream = await self._upstream()
            begun = time.monotonic()
            self._use(1)
            try:
                yield upstream
            except Unreachable:
                self._down_until = time.monotonic() + self.seconds_down
                raise
            finally:
                self._use(-1)
            self._seconds += 0.1 * (time.monotonic() - begun - self._seconds)
        finally:
            self.requests -= 1

    @abstractmethod
    async def _upstream(self) -> Upstream: ...

    def _use(self, change: int) -> None:
        """A request begins or ends to use what ``_upstream`` gave."""
        self.using += change


class Remote(Serving):
    """Another server with an OpenAI-compatible API."""

    engine = "remote"

    def __init__(self, name: str, section: Backend, key: str | None) -> None:
        super().__init__(name, section)
        assert section.url is not None
        url = section.url.rstrip("/").removesuffix("/v1")
        self._address = Upstream(url, key, section.model or name)

    async def _upstream(self) -> Upstream:
        return self._address
