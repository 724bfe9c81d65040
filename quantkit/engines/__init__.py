"""Engines: what runs a variant. Looked up by name, imported on first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

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
    found = _first(model.format, lambda can: can.logits == "full")
    return scoring(found or _no_engine(model, "gives full logits"), model)


def serving_engine(model: Model, config: EngineConfig | None = None) -> ServingEngine:
    """The engine that is asked for or, without one, the first that serves this model's format.

    Raise IncompatibleVariant where it does not serve.
    """
    if config is not None:
        return serving(load_engine(config), model)
    return serving(first_serving(model.format) or _no_engine(model, "serves"), model)


def first_serving(format_: str) -> Engine | None:
    """The first engine that serves a format; None where there is none."""
    return _first(format_, lambda can: can.serves)


def _first(format_: str, able: Callable[[Capabilities], bool]) -> Engine | None:
    engines = map(load_engine, registry.registered("engine"))
    return next(
        (
            engine
            for engine in engines
            if able(engine.capabilities) and format_ in engine.capabilities.formats
        ),
        None,
    )


def _no_engine(model: Model, what: str) -> NoReturn:
    raise IncompatibleVariant(f"no engine {what} for the format {model.format} ({model.path})")
