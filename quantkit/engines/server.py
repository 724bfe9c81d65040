"""A server to be: how it is to run, and the command line that starts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from quantkit.errors import RecipeError
from quantkit.models.engine_config import Option

_START_SECONDS = 300.0
_SLOWEST_BYTES_PER_S = 50e6


@dataclass(frozen=True)
class ServeOptions:
    """How to start a server. ``context`` is tokens per request (None: the model's own maximum),
    ``slots`` how many requests run at the same time."""

    port: int
    host: str = "127.0.0.1"
    api_key: str | None = None
    context: int | None = None
    slots: int = 4
    model_name: str | None = None
    """The model's name in the API; None: the model's id."""
    prefix_cache: bool = True
    """Whether prompts that begin alike share work; off where each must cost the same."""
    longest: int | None = None
    """Tokens of a request that comes alone and may be longer than ``context``."""


@dataclass(frozen=True)
class ServerCommand:
    """A server's process: what to execute, and where it says that it is ready."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's environment."""
    ready_path: str = "/health"
    """Answers 200 once the model is loaded."""
    start_timeout_s: float = _START_SECONDS


def start_timeout(weights: int) -> float:
    """Seconds until a server must be ready; its ``weights`` (bytes) may be on a slow disk."""
    return _START_SECONDS + weights / _SLOWEST_BYTES_PER_S


def asked(
    options: ServeOptions, own: Mapping[str, Option]
) -> tuple[ServeOptions, dict[str, Option]]:
    """``options`` with the engine's own ``context`` and ``slots`` where it has them, and the rest
    of its own. Raise RecipeError where these are no numbers."""
    rest = dict(own)
    given = {name: rest.pop(name) for name in ("context", "slots") if name in rest}
    try:
        numbers = {name: int(value) for name, value in given.items()}
    except ValueError as error:
        raise RecipeError(f"engine: context and slots are whole numbers, not {given}") from error
    for name, value in numbers.items():
        if value < 1:
            raise RecipeError(f"engine: {name} is {value}, expected a whole number above 0")
    return (
        replace(
            options,
            context=numbers.get("context", options.context),
            slots=numbers.get("slots", options.slots),
        ),
        rest,
    )
