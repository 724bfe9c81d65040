"""An engine with its options: what rows are compared by, and what is served as it was measured."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from quantkit.errors import RecipeError, did_you_mean
from quantkit.registry import check_name, registered
from quantkit.system.yaml_file import as_value_error

Option = bool | int | float | str
"""A value on a command line; ``True`` is a flag without one."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_OWNED = frozenset({
    "model", "served-model-name", "alias", "host", "port", "uds", "api-key", "api-key-file",
    "root-path", "api-prefix",
})  # fmt: skip
"""What quantkit itself decides about."""


def check_options(options: Mapping[str, Option]) -> None:
    """Raise ValueError for what is no option, or one that quantkit sets itself."""
    for name in options:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of an engine's option")
        if name.replace("_", "-") in _OWNED or name.startswith("ssl"):
            raise ValueError(f"{name!r} is decided by quantkit")


def words(options: Mapping[str, Option]) -> list[str]:
    """``{"tensor_parallel_size": 2, "enforce_eager": True}`` as words of a command line."""
    found: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found += [flag] if value else []
        else:
            found += [flag, str(value)]
    return found


def options_of(pairs: Sequence[str], where: str) -> dict[str, Option]:
    """Options from ``NAME=VALUE`` or ``NAME``; raise RecipeError, beginning with ``where``, for one
    that may not be given."""
    parts = [pair.partition("=") for pair in pairs]
    options: dict[str, Option] = {name: v if equals else True for name, equals, v in parts}
    try:
        check_options(options)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error
    return options


def by_engine(
    options: Mapping[str, Option], engines: Collection[str]
) -> dict[str, dict[str, Option]]:
    """Which of the options each of these engines is given, all of which run: ``vllm.dtype`` is one
    of vLLM's, and a name without an engine before it is for the only one.

    Raise RecipeError for what no engine here takes, or more than one could.
    """
    running = list(dict.fromkeys(engines))
    found: dict[str, dict[str, Option]] = {engine: {} for engine in running}
    for full, value in options.items():
        engine, name = _addressed(full)
        if engine is None and len(running) > 1:
            raise RecipeError(
                f"engine option {name}: {' and '.join(running)} run here; say whose it is: "
                + " or ".join(f"{one}.{name}" for one in running)
            )
        if engine is not None and engine not in running:
            raise RecipeError(
                f"engine option {full}: {engine} does not run here, only {' and '.join(running)}; "
                f"leave it out, or choose --engine {engine}"
            )
        try:
            check_options({name: value})
        except ValueError as error:
            raise RecipeError(f"engine option {full}: {error}") from error
        found[engine or running[0]][name] = value
    return found


def _addressed(name: str) -> tuple[str | None, str]:
    """The engine before the first dot, and the rest; vLLM has options with dots of their own."""
    engine, dot, rest = name.partition(".")
    known = registered("engine")
    if not dot or (engine not in known and not did_you_mean(engine, known)):
        return None, name
    check_name("engine", engine, f"engine option {name}: ")
    return engine, rest


_USUAL_KV_CACHE = (None, "auto", "f16")


class EngineConfig(BaseModel):
    """``name`` as in the registry; ``version`` is what ran, None where it is only asked for.

    ``options``: ``kv_cache`` (the type of its keys and values, in the engine's words), ``context``
    and ``slots`` (tokens of a request, requests at a time), and any option of the engine's own
    command line by its name, with dashes or with underscores, which are kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str | None = None
    options: dict[str, Option] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _may_be_given(cls, options: dict[str, Option]) -> dict[str, Option]:
        check_options(options)
        return {name.replace("-", "_"): value for name, value in options.items()}

    @classmethod
    def parse(cls, text: str) -> EngineConfig:
        """``llamacpp``, or with options ``llamacpp:kv_cache=q8_0,flash_attn=on``.

        Raise RecipeError for an unknown engine or an option that may not be given.
        """
        name, colon, rest = text.strip().partition(":")
        pairs = [pair.strip() for pair in rest.split(",") if pair.strip()] if colon else []
        check_name("engine", name)
        return cls(name=name, options=options_of(pairs, f"engine {text}"))

    @classmethod
    def of_entry(cls, entry: Any) -> EngineConfig:
        """An entry of a recipe: a name, or a mapping of ``name`` and options.

        Raise RecipeError where it is neither.
        """
        if isinstance(entry, EngineConfig):
            return entry
        if isinstance(entry, str):
            return cls.parse(entry)
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise RecipeError(
                "expected an engine's name, or a mapping of its `name` and options: "
                "{name: llamacpp, kv_cache: q8_0}"
            )
        check_name("engine", entry["name"])
        if set(entry) <= {"name", "version", "options"} and isinstance(entry.get("options"), dict):
            return cls.model_validate(entry)  # as it was written
        given = {str(key): value for key, value in entry.items() if key != "name"}
        try:
            return cls(name=entry["name"], options=given)
        except ValidationError as error:
            problem = error.errors()[0]
            raise RecipeError(f"engine {entry['name']}: {problem['msg']}") from error

    def having(self, options: Mapping[str, Option]) -> EngineConfig:
        """The same as it is asked for, without a version, with these options too, which win."""
        return EngineConfig(name=self.name, options={**self.options, **options})

    @property
    def id(self) -> str:
        """Name and options, without the version: what tells it from others in one report."""
        said = ", ".join(f"{name}={_said(value)}" for name, value in sorted(self.options.items()))
        return f"{self.name} ({said})" if said else self.name

    @property
    def kv_cache(self) -> str | None:
        """The type of keys and values; None where it is the engine's usual one."""
        kind = self.options.get("kv_cache")
        return None if kind in _USUAL_KV_CACHE else str(kind)

    def __str__(self) -> str:
        """``llamacpp 0.3.36``, ``llamacpp 0.3.36 (kv_cache=q8_0)``."""
        version = "" if self.version is None else f" {self.version}"
        return f"{self.name}{version}{self.id.removeprefix(self.name)}"

    def __hash__(self) -> int:
        return hash((self.name, self.version, tuple(sorted(self.options.items()))))


def _said(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _entry(value: Any) -> Any:
    with as_value_error():
        return EngineConfig.of_entry(value)


EngineEntry = Annotated[EngineConfig, BeforeValidator(_entry)]
"""In a file that a person writes: ``llamacpp``, or ``{name: llamacpp, kv_cache: q8_0}``."""
