"""An engine on this machine: started on first use, unloaded, restarted when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from quantkit.engines.base import ServingEngine
from quantkit.errors import EngineError, QuantkitError
from quantkit.gateway import access_log
from quantkit.gateway.answers import NotTaken
from quantkit.gateway.backends import Serving, Upstream
from quantkit.gateway.chats import renders_chats
from quantkit.gateway.config import Backend
from quantkit.gateway.engine_process import EngineProcess
from quantkit.models.variant import Model

_SECONDS_BETWEEN_LOOKS = 0.2
_FIRST_BACK_OFF, _LAST_BACK_OFF = 0.5, 60.0
_STEADY_SECONDS = 30.0
"""Seconds after which an engine that dies is restarted as if it had never died before."""
_ENGINE_OVERHEAD = {"vllm": 2 << 30}
"""Bytes beside weights and cache, until they are measured."""
_SMALL_OVERHEAD = 100 << 20


class Local(Serving):
    """An engine on this machine: started on first use, restarted when it dies.

    ``reserve`` waits until there is memory for it; it raises NotTaken where that takes too long.
    """

    attempts = 2  # the second one goes to the engine that is started for one which has died
    seconds_down = 1.0  # in which that is noticed

    def __init__(
        self,
        name: str,
        section: Backend,
        model: Model,
        engine: ServingEngine,
        log: Path,
        reserve: Callable[[Local], Awaitable[None]],
    ) -> None:
        super().__init__(name, section)
        self.engine = engine.name
        self.sums_choices = engine.capabilities.sums_choices
        self.renders_chats = renders_chats(model, engine.options)
        self.reserved = False
        """Whether it counts in the memory budget: it runs, or is about to."""
        self.process: EngineProcess | None = None
        self.restarts = 0
        self.memory = 0
        """Bytes, as last measured; 0 while it does not run."""
        self.last_used = time.monotonic()
        self._model, self._engine, self._log, self._reserve = model, engine, log, reserve
        overhead = _ENGINE_OVERHEAD.get(engine.name, _SMALL_OVERHEAD)
        self._estimate = section.memory or int(model.bytes * 1.1) + overhead
        self._peak = 0
        self._starting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._wanted = section.preload
        self._failures = 0
        self._retry_at = 0.0
        self._leaving = False
        self._left = asyncio.Event()
        self._idle = asyncio.Event()

    @property
    def cost(self) -> int:
        """Bytes that it counts for in the memory budget."""
        return self.section.memory or self._peak or self._estimate

    @property
    def ready(self) -> bool:
        """Whether it answers, and may."""
        return self.process is not None and not self._leaving

    @property
    def expected(self) -> bool:
        """Whether it should be ready: preloaded, or used since it was last unloaded."""
        return self._wanted

    def start(self) -> None:
        """Begin to start it, unless that has happened."""
        if self.process is None and self._starting is None and not self._leaving:
            self._begin(0.0)

    async def get_ready(self) -> None:
        """Start it, and wait until it answers; raise EngineError, which says why, where it does
        not."""
        self.start()
        assert self._starting is not None
        try:
            await asyncio.shield(self._starting)
        except NotTaken as refusal:
            raise EngineError(str(refusal.__cause__ or refusal)) from refusal

    async def unload(self, seconds: float, why: str) -> bool:
        """Accept no requests, and stop the engine once none uses it; False, and everything as
        before, where that takes longer than ``seconds``."""
        self._leaving = True
        self._left.clear()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while self.using:
                        self._idle.clear()
                        await self._idle.wait()
            if self.using or self.process is None:
                return self.process is None
            access_log.event("engine unloaded", backend=self.name, why=why)
            self._wanted = False
            await self._stop()
            return True
        finally:
            self._leaving = False
            self._left.set()

    async def measure(self) -> None:
        """Look at its memory and its log."""
        if (process := self.process) is not None:
            process.bound_log()
            found = await process.memory()
            if process is self.process:
                self.memory, self._peak = found, max(self._peak, found)

    async def close(self) -> None:
        """End it for good."""
        self._wanted = False
        if self._again is not None:
            self._again.cancel()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        await self._stop()

    async def _upstream(self) -> Upstream:
        while (
            (process := self.process) is None
            or process.exit_code is not None
            or self._leaving
            or self.down
        ):
            if self._leaving:
                await self._left.wait()
            elif process is not None:
                await asyncio.sleep(_SECONDS_BETWEEN_LOOKS / 4)
            elif self._starting is not None or time.monotonic() >= self._retry_at:
                self.start()
                assert self._starting is not None
                await asyncio.shield(self._starting)
            else:
                raise self._unavailable()
        return Upstream(process.url, process.key, self.name)

    def _use(self, change: int) -> None:
        super()._use(change)
        self.last_used = time.monotonic()
        if not self.using:
            self._idle.set()

    def _begin(self, delay: float) -> None:
        self._starting = asyncio.create_task(self._start(delay))
        # Whoever waits is told; where nobody does, the log has it.
        self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _start(self, delay: float) -> None:
        try:
            await asyncio.sleep(delay)
            await self._reserve(self)
            access_log.event(
                "engine starting", backend=self.name, engine=self.engine, log=self._log
            )
            began = time.monotonic()
            self.process = await EngineProcess.launch(
                self.name, self._model, self._engine, self.section, self._log
            )
        except (QuantkitError, OSError) as error:
            self.reserved = False
            access_log.event("engine failed", backend=self.name, error=str(error))
            wait = self._back_off()
            if self._wanted:
                self._again = asyncio.get_running_loop().call_later(wait, self.start)
            raise self._unavailable() from error
        except BaseException:
            self.reserved = False
            raise
        finally:
            self._starting = None
        self._wanted = True
        self._down_until = 0.0
        self.last_used = time.monotonic()
        seconds = round(self.last_used - began, 2)
        access_log.event("engine ready", backend=self.name, seconds=seconds)
        self._watching = asyncio.create_task(self._watch(self.process))

    async def _watch(self, process: EngineProcess) -> None:
        """Until the process ends by itself; then start another one."""
        began = time.monotonic()
        await self.measure()
        while process.exit_code is None:
            await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)
        access_log.event("engine died", backend=self.name, error=process.died())
        await process.close()
        self.process, self.reserved, self.memory = None, False, 0
        self.restarts += 1
        if time.monotonic() - began > _STEADY_SECONDS:
            self._failures = 0
        self._begin(self._back_off())

    async def _stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        process, self.process = self.process, None
        if process is not None:
            await process.close()
        self.reserved, self.memory, self._failures = False, 0, 0

    def _back_off(self) -> float:
        wait: float = min(_LAST_BACK_OFF, _FIRST_BACK_OFF * 2**self._failures)
        self._failures += 1
        self._retry_at = time.monotonic() + wait
        return wait

    def _unavailable(self) -> NotTaken:
        return NotTaken(
            503,
            f"{self.name}: its engine could not be started; the server's log says why",
            retry_after=self._retry_at - time.monotonic(),
        )
