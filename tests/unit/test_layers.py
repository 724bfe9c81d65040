"""The order of the rooms, held to the imports themselves: those of types and lazy ones included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import quantkit

PACKAGE = Path(quantkit.__file__).parent

ORDER = (
    ("errors", "registry", "version"),
    ("system",),
    ("toolchains",),
    ("models",),
    ("data",),
    ("formats",),
    ("ledger",),
    ("decoder",),
    ("quantize",),
    ("engines",),
    ("producers",),
    ("evaluation",),
    ("benchmark",),
    ("recommendation",),
    ("reports",),
    ("runs",),
    ("gateway",),
    ("doctor",),
    ("api",),
    ("cli",),
)
"""Each imports from itself and from those above it in this list."""
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

OUTSIDE = ("quantkit", "quantkit.__main__")
"""The package itself, which gives out the API's names, and what starts the command line."""


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package, by its full name."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """What each module imports of the package, anywhere in it."""
    known = modules(package)
    found = {}
    for name, path in known.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                each = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {one if one in known else node.module for one in each}
        found[name] = (targets & set(known)) - {name}
    return found


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return {name: targets for name, targets in imports(PACKAGE).items() if name not in OUTSIDE}


def test_every_room_has_its_place(graph: dict[str, set[str]]) -> None:
    assert {room(module) for module in graph} == set(LEVEL)


def test_no_import_against_the_order(graph: dict[str, set[str]]) -> None:
    against = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if target in OUTSIDE or LEVEL[room(target)] > LEVEL[room(module)]
    ]
    assert against == []


def test_no_circle_among_modules(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_layers_are_read_from_lazy_and_typed_imports(tmp_path: Path) -> None:
    package = tmp_path / "quantkit"
    (package / "models").mkdir(parents=True)
    for name in ("__init__.py", "models/__init__.py", "cli.py"):
        (package / name).write_text("")
    (package / "models" / "a.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from quantkit import cli\n"
        "def f():\n    import quantkit.models.b\n"
    )
    (package / "models" / "b.py").write_text("from quantkit.models.a import f\n")
    found = imports(package)
    assert found["quantkit.models.a"] == {"quantkit.cli", "quantkit.models.b"}
    assert found["quantkit.models.b"] == {"quantkit.models.a"}
