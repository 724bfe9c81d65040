"""What a gateway serves: a YAML file, or what the command line says, as one configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from quantkit.errors import RecipeError, did_you_mean
from quantkit.models.engine_config import EngineEntry
from quantkit.system.sizes import Size
from quantkit.system.yaml_file import Section, first_problem, read_yaml


class Backend(Section):
    """One engine on this machine (``path``), or another server (``url``)."""

    path: str | None = None
    """A variant, a checkpoint or a bare GGUF file."""
    url: str | None = Field(None, pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$")
    """The address of an OpenAI-compatible API, such as http://gpu-2:8000/v1."""
    api_key_env: str | None = None
    """The environment variable that holds the key of ``url``."""
    model: str | None = None
    """What ``url`` calls the model; this backend's own name where null."""
    engine: EngineEntry | None = None
    """The engine's name, or ``{name: vllm, tensor_parallel_size: 2}``; null: the first that serves
    the format."""
    context: int | None = Field(None, ge=1)
    """Tokens a request; the model's own maximum where null."""
    slots: int = Field(4, ge=1)
    """Requests that it computes at the same time."""
    queue: int = Field(64, ge=0)
    """Requests that may wait for a slot; one more is refused with 429."""
    preload: bool = False
    memory: Size | None = None
    """What it counts for in the memory budget; estimated, then measured where null."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.url is None):
            raise ValueError("expected either `path` or `url`")
        if self.url is not None:
            local = {"engine", "context", "preload", "memory"} & self.model_fields_set
            if local:
                raise ValueError(f"`{min(local)}` is for a `path`, not for a `url`")
        elif self.api_key_env or self.model:
            raise ValueError("`api_key_env` and `model` are for a `url`, not for a `path`")
        return self


def _names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Rule(Section):
    """Where requests go that meet every condition which is given here."""

    backend: Annotated[list[str], BeforeValidator(_names), Field(min_length=1)]
    """One, or several: the least busy of these is taken."""
    priority: Annotated[list[str], BeforeValidator(_names)] | None = None
    """Values of the header X-Priority."""
    prompt_characters_over: int | None = Field(None, ge=0)
    """The prompt is longer than this; a token id counts as four characters."""
    running_over: int | None = Field(None, ge=0)
    """More requests than this are running under the model's name."""

    @property
    def always(self) -> bool:
        """Whether there is no condition."""
        return self.model_dump(exclude={"backend"}, exclude_none=True) == {}


def _rules(value: Any) -> Any:
    return [{"backend": value}] if isinstance(value, str) else value


class Limits(Section):
    """What keeps one client from harming the others."""

    body: Size = 8 << 20
    """Bytes of a request's body."""
    bodies: Size = 64 << 20
    """Bytes of all bodies that are held at the same time."""
    connections: int = Field(4096, ge=1)
    deadline_seconds: float = Field(600, gt=0)
    """For a request, from its arrival to the end of its answer."""
    client_seconds: float = Field(30, gt=0)
    """For a client to send a request, or to take what it is sent."""
    room_seconds: float = Field(30, ge=0)
    """How long a request waits until there is memory for its engine."""
    drain_seconds: float = Field(30, ge=0, le=30)
    """For requests that run when the gateway is asked to end."""


class GatewayConfig(Section):
    """A whole gateway."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    api_key_env: str = "QUANTKIT_API_KEY"
    """The environment variable that holds the key demanded of clients."""
    memory_budget: Size | None = None
    idle_timeout_seconds: float | None = Field(None, gt=0)
    """Seconds without a request after which an engine is unloaded; null: never."""
    backends: dict[str, Backend] = Field(min_length=1)
    models: dict[str, Annotated[list[Rule], BeforeValidator(_rules), Field(min_length=1)]] = Field(
        default_factory=dict
    )
    """What clients ask for: a backend, or rules of which the first that holds decides. Every
    backend under its own name where there are none."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Other names of models."""
    limits: Limits = Limits()

    @model_validator(mode="before")
    @classmethod
    def _models_by_default(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("backends"), dict):
            return {**value, "models": value.get("models") or {n: n for n in value["backends"]}}
        return value

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for name, rules in self.models.items():
            for rule in rules:
                for backend in rule.backend:
                    if backend not in self.backends:
                        raise ValueError(
                            f"models.{name}: no backend {backend!r}; backends are "
                            f"{', '.join(self.backends)}{did_you_mean(backend, self.backends)}"
                        )
            for number, rule in enumerate(rules, 1):
                if rule.always != (number == len(rules)):
                    raise ValueError(
                        f"models.{name}: the last rule, and only that, must have no condition"
                    )
        for alias, model in self.aliases.items():
            if alias in self.models:
                raise ValueError(f"aliases.{alias}: is the name of a model")
            if model not in self.models:
                raise ValueError(
                    f"aliases.{alias}: no model {model!r}; models are "
                    f"{', '.join(self.models)}{did_you_mean(model, self.models)}"
                )
        return self

    def key(self) -> str | None:
        """The key that is demanded of clients, out of the environment."""
        return os.environ.get(self.api_key_env) or None


def load_config(path: Path, overrides: Mapping[str, Any]) -> GatewayConfig:
    """Read a gateway's YAML file; ``overrides`` replace keys at the top, None where not given.

    Paths in it are relative to the file. Raise RecipeError with line and key of what is wrong.
    """
    path = path.expanduser()
    if not path.is_file():
        raise RecipeError(f"--config {path}: no such file")
    text, content = read_yaml(path)
    content |= {key: value for key, value in overrides.items() if value is not None}
    try:
        config = GatewayConfig.model_validate(content)
    except ValidationError as error:
        raise first_problem(GatewayConfig, path, text, error) from error
    return config.model_copy(
        update={"backends": {n: _beside(path, b) for n, b in config.backends.items()}}
    )


def of_command_line(
    backends: Mapping[str, Mapping[str, Any]],
    aliases: Sequence[str],
    known_aliases: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> GatewayConfig:
    """The gateway of ``quantkit serve PATH PATH``; ``aliases`` are ``NAME=MODEL``.

    Raise RecipeError for an option that is no good.
    """
    named = dict(known_aliases)
    for alias in aliases:
        name, equals, model = alias.partition("=")
        if not (name and equals and model):
            raise RecipeError(f"--alias {alias!r}: expected NAME=MODEL, such as fast=gguf-Q4_0")
        named[name] = model
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return GatewayConfig.model_validate({"backends": backends, "aliases": named, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][-1]).replace("_", "-") if problem["loc"] else "serve"
        said = problem.get("ctx", {}).get("error") or problem["msg"]
        raise RecipeError(f"{option}: {said}") from error


def _beside(file: Path, backend: Backend) -> Backend:
    """With a path as seen from here; one that does not exist may be the id of a model."""
    if backend.path is None:
        return backend
    path = Path(backend.path).expanduser()
    found = path if path.is_absolute() else file.parent / path
    return backend.model_copy(update={"path": str(found) if found.exists() else backend.path})
