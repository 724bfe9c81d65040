"""Which group of a config a linear belongs to, as vLLM decides it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantkit.errors import IncompatibleVariant


def check_targets(targets: Any, where: str) -> None:
    """Raise IncompatibleVariant, naming the group, for what is no list of names and patterns."""
    if not isinstance(targets, list | None):
        raise IncompatibleVariant(f"{where} has targets {targets!r}, expected a list of names")
    for target in map(str, targets or []):
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise IncompatibleVariant(
                f"{where}: its target {target!r} is no regular expression: {error}"
            ) from error


def group_of(groups: Mapping[str, Mapping[str, Any]], linear: str) -> str | None:
    """The key of the group of a quantized linear, by its name in the file; None where none of them
    names it. Names decide before patterns of names (``re:``), and these before kinds of modules."""
    targets = [
        (str(target), key)
        for key, group in groups.items()
        for target in group.get("targets") or ["Linear"]
    ]
    for is_for in (_named, _matched, _of_kind):
        for target, key in targets:
            if is_for(target, linear):
                return key
    return None


def _named(target: str, linear: str) -> bool:
    return target == linear or linear.endswith(f".{target}")


def _matched(target: str, linear: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), linear) is not None


def _of_kind(target: str, _: str) -> bool:
    return target == "Linear"
