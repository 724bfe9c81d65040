"""Serve one variant behind the OpenAI API, on the engine that its format runs on."""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from quantkit import engines
from quantkit.engines.base import ServeOptions
from quantkit.engines.process import check_port, launched
from quantkit.errors import RecipeError
from quantkit.progress import say
from quantkit.variant import Model


@dataclass(frozen=True)
class ServeRequest:
    """How to serve; ``engine`` None: the first one that serves the model's format.

    ``context`` is tokens per request, the model's own maximum where None.
    """

    engine: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    context: int | None = None
    slots: int = 4


@dataclass(frozen=True)
class Served:
    """Where the API is."""

    url: str
    model_name: str
    curl: str
    """A command that asks it something."""


def serve(
    model: Model, request: ServeRequest, ready: Callable[[Served], None] | None = None
) -> int:
    """Serve until Ctrl-C (returns 0) or until the engine ends (returns its exit code).

    ``ready`` is called once the API answers. The engine's output goes to stderr. Raise
    RecipeError for an open address without a key, EngineError where the port is in use or the
    engine fails, ToolchainError where it is not installed.
    """
    if request.api_key is None and not _is_loopback(request.host):
        raise RecipeError(
            f"--host {request.host}: anyone who reaches it could use the model; give --api-key"
        )
    name = request.engine
    chosen = engines.load_engine(name) if name else engines.serving_engine(model)
    chosen.check(model)
    check_port(request.host, request.port)
    options = ServeOptions(
        port=request.port,
        host=request.host,
        api_key=request.api_key,
        context=request.context,
        slots=request.slots,
        model_name=model.id,
    )
    command = chosen.server(model, options)
    host = _reachable(request.host)
    say(f"{model.id}: starting {chosen.name} {chosen.version()}; Ctrl-C stops it")
    try:
        with launched(chosen.name, command.argv, command.env, log=None) as server:
            server.wait_ready(host, request.port, command)
            served = _served(model.id, request, host)
            say(f"ready: {served.url}\n\n{served.curl}\n")
            if ready is not None:
                ready(served)
            return server.wait()
    except KeyboardInterrupt:
        say("stopped")
        return 0


def _served(name: str, request: ServeRequest, host: str) -> Served:
    url = f"http://{f'[{host}]' if ':' in host else host}:{request.port}/v1"
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    key = '-H "Authorization: Bearer $API_KEY" ' if request.api_key is not None else ""
    curl = (
        f"curl {url}/chat/completions {key}-H 'Content-Type: application/json' "
        f"-d {shlex.quote(body)}"
    )
    return Served(url, name, curl)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reachable(host: str) -> str:
    """Where this machine reaches a server that listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
