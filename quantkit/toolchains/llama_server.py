"""llama-server: where it is, and how to get it."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.errors import ToolchainError
from quantkit.toolchains import own

HOW_TO_GET = (
    "build llama-cpp-python with its tools (`make setup` does), or install llama.cpp (brew, conda, "
    "a release) so that llama-server is on PATH, or name it: quantkit engines use llamacpp PATH"
)


@dataclass(frozen=True)
class LlamaServer:
    """The program, and what it needs in its environment to find its libraries."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)


def find_llama_server() -> LlamaServer:
    """The user's own (QUANTKIT_LLAMA_SERVER, or `engines use`), llama-cpp-python's, or the one on
    PATH.

    llama-cpp-python's is of the same commit as the library that scores. Raise ToolchainError
    with how to get one where there is none.
    """
    if path := own.named("llamacpp"):
        return LlamaServer(path)
    packages = Path(sysconfig.get_path("platlib"))
    built = packages / "bin" / "llama-server"
    if built.is_file():
        found = [str(packages / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        return LlamaServer(built, {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, found))})
    on_path = shutil.which("llama-server")
    if on_path:
        return LlamaServer(Path(on_path))
    raise ToolchainError(f"llamacpp: llama-server is not installed; {HOW_TO_GET}")
