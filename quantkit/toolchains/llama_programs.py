"""llama.cpp's programs: where they are, and how to get them."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.errors import ToolchainError
from quantkit.toolchains import own

_INSTALL = (
    "build llama-cpp-python with its tools (`make setup` does), or install llama.cpp (brew, conda, "
    "a release) so that {} is on PATH"
)
HOW_TO_GET = f"{_INSTALL.format('llama-server')}, or name it: quantkit engines use llamacpp PATH"


@dataclass(frozen=True)
class Program:
    """One of llama.cpp's, and what it needs in its environment to find its libraries."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)


def find_llama_server() -> Program:
    """The user's own (QUANTKIT_LLAMA_SERVER, or `engines use`), llama-cpp-python's, or the one on
    PATH.

    llama-cpp-python's is of the same commit as the library that scores. Raise ToolchainError
    with how to get one where there is none.
    """
    if path := own.named("llamacpp"):
        return Program(path)
    if found := _installed("llama-server"):
        return found
    raise ToolchainError(f"llamacpp: llama-server is not installed; {HOW_TO_GET}")


def find_llama_imatrix() -> Program:
    """llama-cpp-python's, or the one on PATH; raise ToolchainError as ``find_llama_server``."""
    if found := _installed("llama-imatrix"):
        return found
    raise ToolchainError(
        f"llamacpp: llama-imatrix is not installed; {_INSTALL.format('llama-imatrix')}"
    )


def _installed(name: str) -> Program | None:
    packages = Path(sysconfig.get_path("platlib"))
    built = packages / "bin" / name
    if built.is_file():
        found = [str(packages / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        return Program(built, {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, found))})
    on_path = shutil.which(name)
    return Program(Path(on_path)) if on_path else None
