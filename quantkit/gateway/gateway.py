"""A gateway from its start to its end: listen, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import uvloop
from aiohttp import web

from quantkit.engines.process import check_port
from quantkit.errors import EngineError
from quantkit.gateway import access_log
from quantkit.gateway.app import Gateway
from quantkit.gateway.config import GatewayConfig
from quantkit.gateway.limits import allow_connections, at_most
from quantkit.gateway.pool import Pool
from quantkit.gateway.proxy import new_session

_BACKLOG = 1024
_THREADS = 64
"""Threads for blocking work: engines that start, stop, or are checked."""
_SECONDS_OF_BAD_BODIES = 2.0
"""Seconds for which the rest of a refused body is read, so that the client sees the answer."""


def run(config: GatewayConfig, key: str | None, ready: Callable[[], None]) -> int:
    """Serve until SIGTERM or Ctrl-C, then drain; returns the exit code.

    ``ready`` is called once it listens and ``Pool.start`` is done. Raise QuantkitError where
    something that it needs is missing or all that it has cannot be started, EngineError where it
    cannot listen.
    """
    check_port(config.host, config.port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, key, ready))


async def _serve(config: GatewayConfig, key: str | None, ready: Callable[[], None]) -> int:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(_THREADS, "gateway"))
    asked_to_end = _signals(loop)
    pool = Pool(config)
    session = new_session()
    gateway = Gateway(config, key, pool, session)
    server = web.Server(
        gateway.handle,
        handler_cancellation=True,
        keepalive_timeout=config.limits.client_seconds,
        lingering_time=_SECONDS_OF_BAD_BODIES,
        auto_decompress=False,
        access_log=None,
        logger=_nobody(),
    )
    connections = allow_connections(config.limits.connections)
    try:
        try:
            listener = await loop.create_server(
                at_most(server, connections), config.host, config.port, backlog=_BACKLOG
            )
        except OSError as error:
            raise EngineError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another "
                "with --port"
            ) from error
        ending = asyncio.create_task(asked_to_end.get())
        starting = asyncio.create_task(pool.start())
        await asyncio.wait({starting, ending}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            ready()
        starting.cancel()
        await ending
        listener.close()
        await _drain(gateway, asked_to_end, config.limits.drain_seconds)
        await server.shutdown(1.0)
    finally:
        await session.close()
        await pool.close()
    return 0


async def _drain(gateway: Gateway, asked_to_end: asyncio.Queue[None], seconds: float) -> None:
    """Let running requests end; a second signal ends them at once."""
    gateway.draining = True
    access_log.event("draining", requests=len(gateway.running), seconds=seconds)
    again = asyncio.create_task(asked_to_end.get())
    deadline = asyncio.get_running_loop().time() + seconds
    while gateway.running and not again.done():
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            break
        await asyncio.wait({*gateway.running, again}, timeout=left, return_when="FIRST_COMPLETED")
    again.cancel()
    if running := set(gateway.running):
        access_log.event("abandoned", requests=len(running))
        gateway.abandon()
        await asyncio.wait(running, timeout=1.0)
    access_log.say("stopped")


def _signals(loop: asyncio.AbstractEventLoop) -> asyncio.Queue[None]:
    asked: asyncio.Queue[None] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.put_nowait, None)
    return asked


def _nobody() -> logging.Logger:
    """aiohttp tells of every request that is not HTTP, with a traceback."""
    logger = logging.getLogger("quantkit.gateway.http")
    logger.setLevel(logging.CRITICAL)
    return logger
