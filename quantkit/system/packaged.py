"""Recipes and evals that travel with quantkit."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def packaged_directory(name: str) -> Path:
    """``recipes`` or ``evals``: inside an installed package, or beside it in a checkout."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def packaged_files(name: str) -> list[Path]:
    """The YAML files of ``recipes`` or ``evals``, sorted."""
    return sorted(packaged_directory(name).glob("*.yaml"))
