"""One engine's process as asyncio sees it: on a random loopback port, with a random key."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from pathlib import Path

import psutil

from quantkit.engines.base import ServingEngine
from quantkit.engines.process import Process, free_port, launched
from quantkit.engines.server import ServeOptions
from quantkit.gateway.config import Backend
from quantkit.models.variant import Model

_HOST = "127.0.0.1"
_LOG_BYTES = 16 << 20
"""A log that has become larger is emptied."""


class EngineProcess:
    """Started by ``launch``; ``close`` leaves nothing of it."""

    def __init__(self, process: Process, stack: contextlib.ExitStack, url: str, key: str) -> None:
        self.url = url
        self.key = key
        self._process = process
        self._stack = stack

    @classmethod
    async def launch(
        cls, name: str, model: Model, engine: ServingEngine, section: Backend, log: Path
    ) -> EngineProcess:
        """Start it and wait until it answers; raise EngineError, with its last words, where it
        does not."""
        port, key = free_port(_HOST), secrets.token_hex(16)
        options = ServeOptions(
            port=port,
            host=_HOST,
            api_key=key,
            context=section.context,
            slots=section.slots,
            model_name=name,
        )
        command = engine.server(model, options)
        stack = contextlib.ExitStack()
        started = asyncio.ensure_future(
            asyncio.to_thread(
                stack.enter_context, launched(engine.name, command.argv, command.env, log)
            )
        )
        try:
            process = await asyncio.shield(started)
            await asyncio.to_thread(process.wait_ready, _HOST, port, command)
        except BaseException:
            await asyncio.wait([started])
            await asyncio.to_thread(stack.close)
            raise
        return cls(process, stack, f"http://{_HOST}:{port}", key)

    @property
    def exit_code(self) -> int | None:
        """128 + N for signal N; None while it runs."""
        return self._process.exit_code

    def died(self) -> str:
        """Why it ended, in one line."""
        code = self.exit_code
        hint = " (killed; is the machine out of memory?)" if code == 137 else ""
        return str(self._process.error(f"ended with exit code {code}{hint}"))

    async def memory(self) -> int:
        """Bytes of resident memory of the process and all its children."""
        return await asyncio.to_thread(_resident, self._process.pid)

    def bound_log(self) -> None:
        """Keep the log from growing for ever."""
        log = self._process.log
        with contextlib.suppress(OSError):
            if log.stat().st_size > _LOG_BYTES:
                os.truncate(log, 0)

    async def close(self) -> None:
        """End it, with all that it started."""
        await asyncio.shield(asyncio.to_thread(self._stack.close))


def _resident(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss
    return total
