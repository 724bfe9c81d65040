"""The modules of Python's standard library, as text: some to calibrate on, the others not."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from functools import cache
from pathlib import Path

_NOT_CODE = frozenset({
    "site-packages", "dist-packages", "test", "tests", "ensurepip",
    "encodings", "pydoc_data",  # tables, and the text of pydoc:evaluation
    "distutils", "idlelib", "lib2to3", "tkinter", "turtledemo",  # not installed everywhere
})  # fmt: skip
"""Directories of Python's standard library whose modules are left out."""


def stdlib_modules(*, calibration: bool) -> dict[str, Path]:
    """The modules of Python's standard library that are for calibration, or the others.

    By their path in the library (``json/decoder.py``), in the order of its sha256, which also
    decides: one in four is for calibration, whatever else is installed.
    """
    names = _standard_library()
    digests = {name: hashlib.sha256(name.encode()).digest() for name in names}
    return {
        name: names[name]
        for name in sorted(names, key=digests.__getitem__)
        if (digests[name][0] % 4 == 0) == calibration
    }


@cache
def _standard_library() -> dict[str, Path]:
    """The modules by their path in it, without those of ``_NOT_CODE``."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for place, directories, files in os.walk(root):
        directories[:] = [name for name in directories if name not in _NOT_CODE]
        for path in (Path(place, name) for name in files):
            # _sysconfigdata…: a table of this machine.
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
                found[path.relative_to(root).as_posix()] = path
    return found
