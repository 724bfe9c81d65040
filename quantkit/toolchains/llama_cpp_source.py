"""llama.cpp's own source files, of the version of the library that is installed.

They are in the sdist of llama-cpp-python, under ``vendor/llama.cpp``. A wheel that ``make`` built
has the converter too; others have none of them.
"""

from __future__ import annotations

import sysconfig
import tarfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = "llama-cpp-python"
CONVERTER = "convert_hf_to_gguf.py"
CONVERTER_FILES = (CONVERTER, "conversion/", "gguf-py/", "LICENSE")
"""The converter and what it imports, as beginnings of paths in llama.cpp's tree."""


def library_version() -> str | None:
    """The version of llama-cpp-python here; None where it is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def built_in() -> Path | None:
    """The directory of the converter that was built with the installed library, if it was."""
    directory = Path(sysconfig.get_path("platlib"), "llama_cpp", "converter")
    return directory if (directory / CONVERTER).is_file() else None


def download() -> tuple[str, ...]:
    """The call of pip that fetches the sdist (70 MB) into the directory it is run in; of the
    library's version, where that is installed."""
    library = library_version()
    wanted = PACKAGE if library is None else f"{PACKAGE}=={library}"
    return ("download", "--no-deps", "--no-binary", PACKAGE, wanted)


def unpack(downloaded: Path, out: Path, wanted: tuple[str, ...]) -> None:
    """Unpack the files whose paths begin as ``wanted`` says, out of the sdist in ``downloaded``."""
    (sdist,) = downloaded.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        for member in archive:
            _, found, name = member.name.partition("/vendor/llama.cpp/")
            if found and member.isfile() and name.startswith(wanted):
                member.name = name
                archive.extract(member, out, filter="data")
