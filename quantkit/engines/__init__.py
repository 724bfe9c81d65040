"""Engines: what runs a variant. Looked up by name, imported on first use."""

from __future__ import annotations

from collections.abc import Callable

from quantkit import registry
from quantkit.engines.base import (
    Capabilities,
    Engine,
    ScoringEngine,
    ServingEngine,
    scoring,
    serving,
)
from quantkit.errors import IncompatibleVariant
from quantkit.models.engine_config import EngineConfig
from quantkit.models.variant import Model


def load_engine(config: EngineConfig | str) -> Engine:
    """An engine with its options; by its name alone, without any.

    Raise RecipeError, with the nearest name, where there is no such engine.
    """
    asked = EngineConfig(name=config) if isinstance(config, str) else config
    engine: Engine = registry.load("engine", asked.name, asked.options)
    return engine


def scoring_engine(model: Model) -> ScoringEngine:
    """The first engine that gives full logits for this model's format."""
    return scoring(_first(model, lambda can: can.logits == "full", "gives full logits"), model)


def serving_engine(model: Model, config: EngineConfig | None = None) -> ServingEngine:
    """The engine that is asked for or, without one, the first that serves this model's format.

    Raise IncompatibleVariant where it does not serve.
    """
    if config is not None:
        return serving(load_engine(config), model)
    return serving(_first(model, lambda can: can.serves, "serves"), model)


def first_serving(format_: str) -> str:
    """The name of the first engine that serves a format; empty where there is none."""
    for name in registry.registered("engine"):
        can = load_engine(name).capabilities
        if can.serves and format_ in can.formats:
            return name
    return ""


def _first(model: Model, able: Callable[[Capabilities], bool], what: str) -> Engine:
    for name in registry.registered("engine"):
        engine = load_engine(name)
        if able(engine.capabilities) and model.format in engine.capabilities.formats:
            return engine
    raise IncompatibleVariant(f"no engine {what} for the format {model.format} ({model.path})")
