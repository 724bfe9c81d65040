"""What is in the core and what in an extra, and what is said where an extra is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from quantkit.errors import ToolchainError
from quantkit.system import extras

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[]", one)[0] for one in requirements}


def test_extras_are_those_of_the_package() -> None:
    offered = PROJECT["optional-dependencies"]
    for extra, modules in extras.EXTRAS.items():
        assert names(offered[extra]) == set(modules.values())
        assert not names(offered[extra]) & names(PROJECT["dependencies"])
    assert offered["all"] == [f"quantkit[{','.join(extras.EXTRAS)}]"]
    assert set(extras.PURPOSES) == set(extras.EXTRAS)


def test_require_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None if module == "uvloop" else module)
    assert extras.missing_extras() == ["serve"]
    extras.require("bench")
    with pytest.raises(ToolchainError) as caught:
        extras.require("serve")
    assert str(caught.value) == (
        "uvloop is not installed; it is needed for `quantkit serve`; "
        "run: pip install 'quantkit[serve]'"
    )


def test_command_without_its_extra_ends_with_one_line(tiny_llama: Path) -> None:
    """As in an environment that has the core only."""
    script = (
        "import sys\n"
        "sys.modules['aiohttp'] = None\n"
        "from quantkit.cli.main import main\n"
        f"sys.argv = ['quantkit', 'serve', {str(tiny_llama)!r}]\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr == (
        "quantkit: aiohttp is not installed; it is needed for `quantkit serve`; "
        "run: pip install 'quantkit[serve]'\n"
    )


def test_explained_leaves_other_modules_alone() -> None:
    assert extras.explained(ModuleNotFoundError(name="quantkit.nothing")) is None
    line = extras.explained(ModuleNotFoundError(name="guidellm.entrypoints"))
    assert line is not None
    assert line.endswith("pip install 'quantkit[bench]'")
