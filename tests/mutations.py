"""JSON files with one value replaced by what should not be there."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

VALUES = (
    None,
    "x",
    [],
    {},
    -1,
    0,
    0.5,
    True,
    float("nan"),
    float("inf"),
    1e30,
    10**12,
    ["x"],
    {"x": 1},
)

Place = tuple[int | str, ...]
Mutation = tuple[Place, Any, dict[str, Any]]
"""Where, what is put there, and the whole that it makes."""


def places(content: Any, here: Place = ()) -> Iterator[Place]:
    """Where values are, at every depth; of long lists and objects the first few."""
    if isinstance(content, dict):
        entries: list[tuple[int | str, Any]] = list(content.items())
    else:
        entries = list(enumerate(content)) if isinstance(content, list) else []
    for key, value in entries[:60]:
        yield (*here, key)
        yield from list(places(value, (*here, key)))[:60]


def mutated(content: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    """A copy with ``value`` at ``place``."""
    changed = copy.deepcopy(content)
    inside: Any = changed
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return changed


def sample(content: dict[str, Any], count: int, seed: int = 0) -> list[Mutation]:
    """``count`` mutations of all that there are."""
    every = [(place, value) for place in places(content) for value in VALUES]
    chosen = random.Random(seed).sample(every, min(count, len(every)))
    return [(place, value, mutated(content, place, value)) for place, value in chosen]
