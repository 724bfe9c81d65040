"""Files that exist whole or not at all, and their hashes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError

_HASHED_BYTES = 32 << 20
"""Bytes hashed at a time: between two blocks Python may let another thread run for 5 ms."""


def sha256_file(path: Path) -> str:
    """Hex digest of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(min(_HASHED_BYTES, path.stat().st_size + 1)))
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Hex digests of several files, which are hashed side by side; in the order given."""
    files = list(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(files, pool.map(sha256_file, files), strict=True))


def sha256_json(value: Any) -> str:
    """Hex digest of a JSON value in canonical form (sorted keys, no spaces)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, whose place it takes in one rename; removed on any error."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` in one rename, so that a reader never sees half of it."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in one rename; NaN and infinity are refused, not written."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_directory(final: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``final`` to fill; renamed to it at the end, removed on any error.

    An existing ``final`` is an error unless ``force``, and is then replaced only at the end.
    """
    with partial_directory(final, force=force) as partial:
        yield partial
        settle(partial, final)


@contextmanager
def partial_directory(
    final: Path, *, force: bool = False, resume: str | None = None
) -> Iterator[Path]:
    """A temporary sibling of ``final``, for ``settle``; removed at the end unless that was done.

    With ``resume``, a hash of everything that its content depends on, it is kept on an error,
    unless it is empty, and the next attempt continues with it; one process at a time.
    """
    if final.exists() and not force:
        raise QuantkitError(f"{final}: exists already; choose another place or pass --force")
    final.parent.mkdir(parents=True, exist_ok=True)
    if resume is None:
        partial = final.with_name(f".{final.name}.partial-{os.getpid()}-{secrets.token_hex(3)}")
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return
    partial = final.with_name(f".{final.name}.partial-{resume}")
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
    except BlockingIOError as error:
        raise QuantkitError(f"{final}: another quantkit process is making it") from error
    finally:
        os.close(descriptor)
        with suppress(OSError):  # it holds something, or has its final name by now
            partial.rmdir()


def settle(partial: Path, final: Path) -> None:
    """Give a whole directory its final name, after all of it is on the disk."""
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


def remove_partials(final: Path, *, keep: str | None = None) -> None:
    """Delete what killed attempts to make ``final`` left beside it.

    ``keep``: the ``resume`` of an attempt that is to go on.
    """
    for name, left in partials(final.parent):
        if name == final.name and left.name != f".{name}.partial-{keep}":
            shutil.rmtree(left, ignore_errors=True)


def partials(directory: Path) -> list[tuple[str, Path]]:
    """What killed attempts left in ``directory``: what it was to be called, and what is there."""
    found = sorted(directory.glob(".*.partial-*"))
    return [(left.name[1:].rpartition(".partial-")[0], left) for left in found]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
