"""With the core alone (``pip install quantkit``): each command works, or says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from quantkit import toolchains
from quantkit.errors import ToolchainError
from quantkit.system.extras import EXTRAS
from quantkit.toolchains import llama_cpp_source

_WITHOUT_EXTRAS = f"""
import importlib.metadata, sys
from importlib.machinery import PathFinder

modules = {[module for extra in EXTRAS.values() for module in extra]}
packages = {[package for extra in EXTRAS.values() for package in extra.values()]}
version = importlib.metadata.version

class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, *given):
        return None if name.partition(".")[0] in modules else super().find_spec(name, *given)

def core_version(package):
    if package in packages:
        raise importlib.metadata.PackageNotFoundError(package)
    return version(package)

sys.meta_path = [Core if one is PathFinder else one for one in sys.meta_path]
importlib.metadata.version = core_version
from quantkit.cli.main import main
sys.argv = ["quantkit", *sys.argv[1:]]
main()
"""


def quantkit(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT_EXTRAS, *arguments],
        capture_output=True, text=True, check=False, cwd=home,
        env=os.environ | {"QUANTKIT_HOME": str(home / "home")},
    )  # fmt: skip


RECIPE = """
name: core
source: {source}
calibration: {{samples: 4, sequence_length: 64}}
convert: ["gptq:w4g64"]
evaluate: {{texts: ["pydoc:evaluation"], windows: 2, context: 64}}
bench: null
"""


def test_engines_are_listed(tmp_path: Path) -> None:
    listed = quantkit(tmp_path, "engines", "list")
    assert listed.returncode == 0, listed.stderr
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("llamacpp ")]
    assert "not installed" in line


def test_a_run_without_gguf(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "core.yaml").write_text(RECIPE.format(source=tiny_llama))
    done = quantkit(tmp_path, "run", "core.yaml")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "core" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["convert", "MODEL", "--to", "gguf:Q8_0", "--out", "made"],
         "llama-cpp-python", "llamacpp"),
        (["evaluate", "MODEL", "--engine", "llamacpp", "--text", "pydoc:evaluation"],
         "llama-cpp-python", "llamacpp"),
        (["engines", "install", "llamacpp-converter"], "llama-cpp-python", "llamacpp"),
        (["evaluate", "MODEL", "--eval", "wikitext_file", "--eval-data", "wikitext_file=."],
         "lm-eval", "eval"),
        (["bench", "MODEL"], "guidellm", "bench"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(
    tmp_path: Path, tiny_llama: Path, arguments: list[str], package: str, extra: str
) -> None:
    done = quantkit(tmp_path, *(str(tiny_llama) if a == "MODEL" else a for a in arguments))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("quantkit: ")]
    assert line.startswith(f"quantkit: {package} is not installed; it is needed for ")
    assert line.endswith(f"; run: pip install 'quantkit[{extra}]'")


def test_a_converter_without_its_library_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where files of llama-cpp-python lie in the environment, but not the package."""
    built = tmp_path / "llama_cpp" / "converter"
    built.mkdir(parents=True)
    (built / llama_cpp_source.CONVERTER).touch()

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(llama_cpp_source.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(llama_cpp_source, "version", missing)
    row = {row.name: row for row in toolchains.listing()}["llamacpp-converter"]
    assert (row.version, row.path) == (None, None)
    with pytest.raises(ToolchainError, match="llama-cpp-python is not installed"):
        toolchains.install("llamacpp-converter")
