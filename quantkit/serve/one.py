"""Serve one variant behind the OpenAI API of the engine that its format runs on: no proxy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from quantkit import engines
from quantkit.engines.base import ServeOptions, label
from quantkit.engines.process import check_port, launched
from quantkit.errors import RecipeError
from quantkit.progress import say
from quantkit.serve.address import base_url, curl_example, is_loopback, reachable
from quantkit.serve.arguments import Argument, words
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
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    """Of the engine's own command line."""


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
    if request.api_key is None and not is_loopback(request.host):
        raise RecipeError(
            f"--host {request.host}: anyone who reaches it could use the model; give --api-key"
        )
    chosen = engines.serving_engine(model, request.engine)
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
    argv = (*command.argv, *words(request.arguments))
    say(f"{model.id}: starting {label(chosen)}; Ctrl-C stops it")
    try:
        with launched(chosen.name, argv, command.env, log=None) as server:
            server.wait_ready(reachable(request.host), request.port, command)
            url = base_url(request.host, request.port)
            curl = curl_example(url, model.id, keyed=request.api_key is not None)
            say(f"ready: {url}\n\n{curl}\n")
            if ready is not None:
                ready(Served(url, model.id, curl))
            return server.wait()
    except KeyboardInterrupt:
        say("stopped")
        return 0
