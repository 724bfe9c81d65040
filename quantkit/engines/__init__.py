"""Engines: what runs a variant. Looked up by name, imported on first use."""

from __future__ import annotations

from collections.abc import Callable

from quantkit import registry
from quantkit.engines.base import Capabilities, Engine
from quantkit.errors import IncompatibleVariant
from quantkit.models.variant import Model


def load_engine(name: str) -> Engine:
    """Raise RecipeError, with the nearest name, where there is no such engine."""
    engine: Engine = registry.load("engine", name)
    return engine


def scoring_engine(model: Model) -> Engine:
    """The first engine that gives full logits for this model's format."""
    return _first(model, lambda can: can.logits == "full", "gives full logits")


def serving_engine(model: Model, name: str | None = None) -> Engine:
    """The engine of that name or, without one, the first that serves this model's format."""
    if name:
        return load_engine(name)
    return _first(model, lambda can: can.serves, "serves")


def _first(model: Model, able: Callable[[Capabilities], bool], what: str) -> Engine:
    for name in registry.registered("engine"):
        engine = load_engine(name)
        if able(engine.capabilities) and model.format in engine.capabilities.formats:
            return engine
    raise IncompatibleVariant(f"no engine {what} for the format {model.format} ({model.path})")
