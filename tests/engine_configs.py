"""Engine configurations of made-up results."""

from __future__ import annotations

from quantkit.models.engine_config import EngineConfig


def config(words: str) -> EngineConfig:
    """Of ``llamacpp 0.3.36``: a name and a version."""
    name, version = words.split()
    return EngineConfig(name=name, version=version)
