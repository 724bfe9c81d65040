"""Engines: what runs a variant. Looked up by name, imported on first use."""

from __future__ import annotations

from collections.abc import Callable

from quantkit import registry
from quantkit.engines.base import Capabilities, Engine
from quantkit.errors import IncompatibleVariant
from quantkit.variant import Model

ENGINES = {
    "transformers": "quantkit.engines.transformers:Transformers",
    "llamacpp": "quantkit.engines.llamacpp:LlamaCpp",
    "vllm": "quantkit.engines.vllm:VLLM",
}
"""In the order in which they are asked whether they take a model."""


def load_engine(name: str) -> Engine:
    """Raise RecipeError, with the nearest name, where there is no such engine."""
    engine: Engine = registry.load("engine", name, ENGINES)
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
    for name in ENGINES:
        engine = load_engine(name)
        if able(engine.capabilities) and model.format in engine.capabilities.formats:
            return engine
    raise IncompatibleVariant(f"no engine {what} for the format {model.format} ({model.path})")
