"""A server to be: how it is to run, and the command line that starts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
    """Under which name the API offers the model; the model's id where None."""
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
    start_timeout_s: float = 300.0
