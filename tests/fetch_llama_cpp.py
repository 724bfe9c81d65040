"""Fetch llama.cpp's own converter, the oracle of tests/integration/test_gguf_converter.py.

It is in the sdist of llama-cpp-python, of the version that is installed. Run by `make test`;
does nothing where it is there already. Prints the directory.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from quantkit.files import new_directory
from quantkit.home import home

PACKAGE = "llama-cpp-python"
WANTED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "models/ggml-vocab-", "LICENSE")


def directory() -> Path:
    """Where the sources of the installed version are, or will be."""
    return home() / "llama.cpp-src" / version(PACKAGE)


def fetch() -> Path:
    """Download and unpack what is wanted, unless it is there; raise CalledProcessError offline."""
    final = directory()
    if final.is_dir():
        return final
    with TemporaryDirectory(prefix="quantkit-") as work:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--no-binary", PACKAGE, "--dest", work, f"{PACKAGE}=={version(PACKAGE)}"],
            check=True,
        )  # fmt: skip
        (sdist,) = Path(work).glob("*.tar.gz")
        with new_directory(final) as partial:
            _unpack(sdist, partial)
    return final


def _unpack(sdist: Path, out: Path) -> None:
    with tarfile.open(sdist) as archive:
        for member in archive:
            _, found, name = member.name.partition("/vendor/llama.cpp/")
            if found and member.isfile() and name.startswith(WANTED):
                member.name = name
                archive.extract(member, out, filter="data")


if __name__ == "__main__":
    print(fetch())
