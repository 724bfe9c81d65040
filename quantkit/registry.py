"""Look a class up by its short name, importing its module only then."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from quantkit.errors import RecipeError, did_you_mean


def load(kind: str, name: str, registry: Mapping[str, str]) -> Any:
    """Instantiate ``registry[name]``, a ``"module:Class"`` string.

    Raise RecipeError with the nearest known name where ``name`` is not in the registry.
    """
    if name not in registry:
        raise RecipeError(
            f"unknown {kind} {name!r}; {kind}s are {', '.join(registry)}"
            + did_you_mean(name, registry)
        )
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()
