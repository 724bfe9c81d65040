"""A merged checkpoint as files: what engines, packages and proofs load is what it says it is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit.errors import RecipeError
from quantkit.formats.merged import Merged
from quantkit.formats.shards import Entry, Shards
from quantkit.models.checkpoint import ADAPTER, Checkpoint
from quantkit.models.linked import LEFT_OUT
from quantkit.models.merge_record import MergeRecord
from quantkit.models.variant import MANIFEST, SETTINGS
from quantkit.producers.convert import require_space
from quantkit.system.files import (
    new_directory,
    partial_directory,
    remove_partials,
    sha256_json,
    write_json,
)
from quantkit.system.progress import say

_OF_THE_BASE = (
    *("config.json", ADAPTER, MANIFEST, *SETTINGS),
    *("*.gguf", "*.onnx", "*.h5", "*.msgpack"),
)
"""Files of a base that a merged checkpoint has others for, or none."""


def kept(merged: Merged, place: Path, *, force: bool) -> Checkpoint:
    """The merged checkpoint in ``place``, which holds this one only; written where it is not there.

    Raise RecipeError where another one is there, unless ``force``.
    """
    final = place / merged.id
    if place.is_dir():
        others = [one for one in place.iterdir() if one.is_dir() and not one.name.startswith(".")]
        for other in others:
            if other == final and MergeRecord.of(other) == merged.record:
                say(f"{merged.id}: merged already")
                return Checkpoint.open(other)
            if not force:
                raise RecipeError(
                    f"{other}: was merged from another base or adapter; choose another --out, or "
                    "pass --force to replace it"
                )
        for other in others:
            shutil.rmtree(other)
    remove_partials(final)
    with new_directory(final) as partial:
        _write(merged, partial)
    return Checkpoint.open(final)


@contextmanager
def lent(merged: Merged, out: Path) -> Iterator[Checkpoint]:
    """The merged checkpoint beside what is made of it in ``out``, for as long as that takes."""
    key = sha256_json(merged.record.model_dump())[:16]
    made_here = not out.exists()
    remove_partials(out / merged.id, keep=key)
    try:
        with partial_directory(out / merged.id, force=True, resume=key) as partial:
            directory = partial / merged.id
            try:
                directory.mkdir(exist_ok=True)  # a killed attempt left it: it is written over
                _write(merged, directory)
                yield Checkpoint.open(directory)
            finally:
                shutil.rmtree(directory, ignore_errors=True)
    finally:
        with suppress(OSError):  # it holds something
            if made_here:
                out.rmdir()


def _write(merged: Merged, directory: Path) -> None:
    say(f"{merged.id}: merging {merged.adapter.id} into {merged.base.id}")
    require_space(directory, merged.bytes, merged.id)
    _copy_files(merged.base, directory)
    entries = [Entry(info.name, info.dtype, info.shape) for info in merged.tensors.values()]
    with Shards(directory, entries) as shards:
        for entry in entries:
            shards.write(entry.name, merged.read(entry.name))
    write_json(directory / "config.json", merged.config)
    merged.record.write(directory)


def _copy_files(base: Checkpoint, directory: Path) -> None:
    """What makes the model beside its weights, and what else lies there that describes it."""
    others = [file for file in base.path.iterdir() if file.is_file()]
    for file in {*base.sidecars, *others}:
        left_out = any(file.match(pattern) for pattern in (*LEFT_OUT, *_OF_THE_BASE))
        if not file.name.startswith(".") and not left_out:
            copy = directory / file.relative_to(base.path)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
