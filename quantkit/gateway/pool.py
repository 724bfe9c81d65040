"""All backends of a gateway, and the memory that the engines among them may take."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from quantkit import engines
from quantkit.errors import EngineError, RecipeError
from quantkit.formats.detect import open_model
from quantkit.gateway.answers import NotTaken
from quantkit.gateway.backends import Remote, Serving
from quantkit.gateway.config import Backend, GatewayConfig
from quantkit.gateway.local import Local
from quantkit.system.home import home
from quantkit.system.sizes import gibibytes

_SECONDS_BETWEEN_SWEEPS = 2.0
_SECONDS_BETWEEN_LOOKS = 0.05


class Pool:
    """The backends by name. Everything is opened and checked before anything is started.

    Raise QuantkitError for a model or an engine that is not there, RecipeError for one that can
    never fit into the budget.
    """

    def __init__(self, config: GatewayConfig) -> None:
        self._budget = config.memory_budget
        self._idle_timeout = config.idle_timeout_seconds
        self._room_seconds = config.limits.room_seconds
        self._room = asyncio.Lock()
        self._sweeping: asyncio.Task[None] | None = None
        logs = _log_directory(config.port)
        self.backends = {n: self._open(n, s, logs) for n, s in config.backends.items()}
        for backend in self.locals:
            if self._budget is not None and backend.cost > self._budget:
                raise RecipeError(
                    f"{backend.name}: needs about {gibibytes(backend.cost)}, more than the memory "
                    f"budget of {gibibytes(self._budget)}"
                )

    @property
    def locals(self) -> list[Local]:
        """The engines on this machine."""
        return [one for one in self.backends.values() if isinstance(one, Local)]

    @property
    def ready(self) -> bool:
        """Whether all engines are up that should be."""
        return all(one.ready for one in self.locals if one.expected)

    async def start(self) -> None:
        """Start what is to be preloaded, and look after the engines from now on.

        Where that is all there is, wait until it answers: raise EngineError where it cannot be
        started, since nobody would ever be served.
        """
        self._sweeping = asyncio.create_task(self._sweep())
        preloaded = [one for one in self.locals if one.section.preload]
        if len(preloaded) == len(self.backends) == 1:
            await preloaded[0].get_ready()
        for backend in preloaded:
            backend.start()

    async def close(self) -> None:
        """Stop all engines."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait([self._sweeping])
        await asyncio.gather(*(backend.close() for backend in self.locals))

    async def reserve(self, wanted: Local) -> None:
        """Count ``wanted`` into the budget; who was used longest ago makes room, once idle.

        Starts are let in one after the other. Raise NotTaken 503 where there is no room in time.
        """
        deadline = time.monotonic() + self._room_seconds
        async with self._room:
            while self._budget is not None and self._taken() + wanted.cost > self._budget:
                victims = [one for one in self.locals if one.ready and one is not wanted]
                victim = min(victims, key=lambda one: (one.using > 0, one.last_used), default=None)
                left = max(0.0, deadline - time.monotonic())
                if victim is not None and await victim.unload(left, f"room for {wanted.name}"):
                    continue
                if left == 0.0:
                    raise NotTaken(
                        503,
                        f"{wanted.name}: no memory for its engine now: all others are in use, and "
                        f"the budget is {gibibytes(self._budget)}",
                        retry_after=self._room_seconds,
                    )
                await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
            wanted.reserved = True

    def _taken(self) -> int:
        return sum(one.cost for one in self.locals if one.reserved)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SECONDS_BETWEEN_SWEEPS, self._idle_timeout or 60))
            for backend in self.locals:
                await backend.measure()
            for backend in sorted(self.locals, key=lambda one: one.last_used):
                if not backend.ready or backend.requests:
                    continue
                age = time.monotonic() - backend.last_used
                if self._idle_timeout is not None and age > self._idle_timeout:
                    await backend.unload(0, "idle")
                elif self._too_much():
                    await backend.unload(0, "over the memory budget")

    def _too_much(self) -> bool:
        """Whether engines have grown beyond the budget; a single one is left running."""
        running = sum(one.reserved for one in self.locals)
        return self._budget is not None and running > 1 and self._taken() > self._budget

    def _open(self, name: str, section: Backend, logs: Path) -> Serving:
        if section.url is not None:
            return Remote(name, section, _remote_key(name, section))
        assert section.path is not None
        model = open_model(section.path)
        engine = engines.serving_engine(model, section.engine)
        engine.check(model)
        return Local(name, section, model, engine, logs / f"{_file_name(name)}.log", self.reserve)


def _remote_key(name: str, section: Backend) -> str | None:
    if section.api_key_env is None:
        return None
    key = os.environ.get(section.api_key_env)
    if not key:
        raise RecipeError(f"backends.{name}: the variable {section.api_key_env} is not set")
    return key


def _log_directory(port: int) -> Path:
    """One for each gateway that runs on this machine."""
    logs = home() / "logs" / f"serve-{port}"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EngineError(f"{logs}: cannot keep logs there: {error.strerror}") from error
    return logs


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
