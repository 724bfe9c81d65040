"""Arguments of an engine's own command line that a user passes through."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from quantkit.errors import RecipeError

Argument = bool | int | float | str

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
_OWNED = frozenset({
    "model", "served-model-name", "alias", "host", "port", "uds", "api-key", "api-key-file",
    "root-path", "api-prefix",
})  # fmt: skip
"""What quantkit itself decides about."""


def check(arguments: Mapping[str, Argument]) -> None:
    """Raise ValueError for one that quantkit decides about, or that is none."""
    for name in arguments:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of an engine's argument")
        if name.replace("_", "-") in _OWNED or name.startswith("ssl"):
            raise ValueError(f"{name!r} is decided by quantkit")


def words(arguments: Mapping[str, Argument]) -> list[str]:
    """``{"tensor_parallel_size": 2, "enforce_eager": True}`` as words of a command line."""
    found: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found += [flag] if value else []
        else:
            found += [flag, str(value)]
    return found


def of_pairs(pairs: Sequence[str]) -> dict[str, Argument]:
    """Of ``NAME=VALUE`` or ``NAME``; raise RecipeError for one that may not be passed."""
    parts = [pair.partition("=") for pair in pairs]
    arguments: dict[str, Argument] = {n: value if equals else True for n, equals, value in parts}
    try:
        check(arguments)
    except ValueError as error:
        raise RecipeError(f"--engine-arg: {error}") from error
    return arguments
