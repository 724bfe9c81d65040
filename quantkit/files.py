"""Files that exist whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError


def sha256_file(path: Path) -> str:
    """Hex digest of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON value in canonical form (sorted keys, no spaces)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` in one rename, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in one rename; NaN and infinity are refused, not written."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_directory(final: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``final`` to fill; renamed to it at the end, removed on any error.

    An existing ``final`` is an error unless ``force``, and is then replaced only at the end.
    """
    if final.exists() and not force:
        raise QuantkitError(f"{final}: exists already; choose another place or pass --force")
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}-{secrets.token_hex(3)}")
    partial.mkdir()
    try:
        yield partial
        for path in sorted(partial.rglob("*"), reverse=True):
            _fsync(path)
        _fsync(partial)
        if final.exists():
            retired = final.with_name(f"{partial.name}.old")
            final.rename(retired)
            partial.rename(final)
            shutil.rmtree(retired)
        else:
            partial.rename(final)
        _fsync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_partials(final: Path) -> None:
    """Delete what killed attempts to make ``final`` left beside it; its name may be a pattern."""
    for left in final.parent.glob(f".{final.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
