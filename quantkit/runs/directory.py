"""A run's directory: what was done already is found by content hash and not done again."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from quantkit.data.calibration import Calibration
from quantkit.errors import RecipeError
from quantkit.formats.detect import open_variant
from quantkit.formats.merged import Merged
from quantkit.ledger import REFERENCE
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Model, Variant
from quantkit.producers.base import Plan
from quantkit.producers.convert import convert_many, groups
from quantkit.producers.merge import kept
from quantkit.system.files import partials, sha256_json, write_json
from quantkit.system.progress import say

_MARKER = "run.json"

T = TypeVar("T")


@dataclass(frozen=True)
class RunDirectory:
    """``variants/``, ``results/`` by content hash, ``logs/``, ``ledger.json``, ``report.html``."""

    path: Path

    @property
    def logs(self) -> Path:
        """What engines and the load generator wrote."""
        return self.path / "logs"

    @property
    def cache(self) -> Path:
        """What only this run's stages read: the reference's hidden states."""
        return self.path / "cache"

    def source(self, given: Checkpoint, *, force: bool) -> Checkpoint:
        """The source as files: where it is a merge, the run keeps what that gives."""
        if not isinstance(given, Merged):
            return given
        return kept(given, self.path / "source", force=force)

    def details(self, model: Model) -> Path:
        """Where the values behind a model's metrics go: one line a question, one a position."""
        return self.path / "details" / row_id(model)

    def variants(
        self,
        source: Checkpoint,
        plans: Sequence[Plan],
        calibration: Calibration | None,
        *,
        force: bool = False,
        allow_tokenizer_differences: bool = False,
    ) -> list[Callable[[], Variant]]:
        """For each plan a function that gives its variant: the one that is there, or a new one.

        Those that share a pass over the source are all made on the first call. A call raises what
        making its variant raised, and RecipeError if another one is in its place, unless
        ``force``.
        """
        by_spec = {plan.spec: plan for plan in plans}
        names = {spec.directory for spec in by_spec}
        for name, left in partials(self.path / "variants"):
            if name not in names:  # those that are wanted are gone on with, or replaced
                shutil.rmtree(left, ignore_errors=True)
        makers: dict[Spec, Callable[[], Variant]] = {}
        for group in groups(list(by_spec)):
            wanted = [by_spec[spec] for spec in group]
            make = cache(
                partial(
                    self._make,
                    source,
                    wanted,
                    calibration,
                    force=force,
                    allow_tokenizer_differences=allow_tokenizer_differences,
                )
            )
            makers |= {spec: partial(_made, make, spec) for spec in group}
        return [makers[plan.spec] for plan in plans]

    def _make(
        self,
        source: Checkpoint,
        plans: Sequence[Plan],
        calibration: Calibration | None,
        *,
        force: bool,
        allow_tokenizer_differences: bool,
    ) -> dict[Spec, Variant | Exception]:
        kept = {plan.spec: self._kept(source, plan, calibration, force=force) for plan in plans}
        found = {spec: variant for spec, variant in kept.items() if variant is not None}
        missing = [spec for spec in kept if spec not in found]
        place = self.path / "variants"
        made = convert_many(
            source,
            missing,
            calibration,
            place,
            force=force,
            allow_tokenizer_differences=allow_tokenizer_differences,
        )
        return {**found, **made}

    def _kept(
        self, source: Checkpoint, plan: Plan, calibration: Calibration | None, *, force: bool
    ) -> Variant | RecipeError | None:
        """The variant that is there already; an error where it is another, unless ``force``."""
        existing = self.path / "variants" / plan.spec.directory
        if not existing.exists():
            return None
        variant = open_variant(existing)
        other = _other_origin(variant, plan, source, calibration)
        if other is None:
            say(f"{variant.id}: made already")
            return variant
        if force:
            return None
        return RecipeError(
            f"{existing}: was made from another {other}; choose another --out, or pass --force to "
            "replace it"
        )

    def result(self, kind: str, model: Model, key: Any, make: Callable[[], T], shape: type[T]) -> T:
        """``make()``, or what it gave before for the same model and ``key`` (a JSON value).

        ``shape`` is the type that the stored JSON is read as.
        """
        kept: list[Any] = [model_digest(model), key]
        return self.kept(f"{row_id(model)}-{kind}", kept, make, shape)

    def kept(self, name: str, key: Any, make: Callable[[], T], shape: type[T]) -> T:
        """``make()``, or what it gave before for the same ``name``, part of a file's, and ``key``.

        Written as soon as it is made.
        """
        adapter = TypeAdapter(shape)
        path = self.path / "results" / f"{name}-{sha256_json([name, key])[:16]}.json"
        if path.is_file():
            try:
                stored = adapter.validate_json(path.read_bytes())
            except ValidationError:
                say(f"{path}: not readable; measuring again")
            else:
                say(f"{name}: done already")
                return stored
        value = make()
        path.parent.mkdir(exist_ok=True)
        write_json(path, adapter.dump_python(value, mode="json"))
        return value


@contextmanager
def open_run(path: Path) -> Iterator[RunDirectory]:
    """Open or begin a run's directory, for one process at a time.

    Raise RecipeError where the directory holds something that is not a run, or another process
    works in it.
    """
    path = path.expanduser().absolute()
    marker = path / _MARKER
    if path.exists() and not path.is_dir():
        raise RecipeError(f"{path}: is a file; --out must be a directory")
    if path.is_dir() and any(path.iterdir()) and not marker.is_file():
        raise RecipeError(
            f"{path}: exists and is not a quantkit run (no {_MARKER}); choose another --out"
        )
    path.mkdir(parents=True, exist_ok=True)
    with marker.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(f"{path}: another quantkit process works in this run") from error
        if marker.stat().st_size == 0:
            file.write(json.dumps({"schema_version": 1}) + "\n")
            file.flush()
        directory = RunDirectory(path)
        directory.logs.mkdir(exist_ok=True)
        yield directory


def row_id(model: Model) -> str:
    """The id of a model's row in the ledger, which is also a file name."""
    return REFERENCE if isinstance(model, Checkpoint) else model.id


def model_digest(model: Model) -> str:
    """One digest for the files of a checkpoint or of a variant."""
    return sha256_json(model.sha256)


def _made(make: Callable[[], dict[Spec, Variant | Exception]], spec: Spec) -> Variant:
    found = make()[spec]
    if isinstance(found, Exception):
        raise found
    return found


def _other_origin(
    variant: Variant, plan: Plan, source: Checkpoint, calibration: Calibration | None
) -> str | None:
    """What an existing variant was made from that is not what is asked for, or None."""
    manifest = variant.manifest
    if manifest is None or manifest.source.sha256 != source.sha256:
        return "source"
    spec = plan.spec
    own = {"format": spec.format, "scheme": spec.scheme, "producer": spec.producer}
    asked = own | plan.options
    for key, value in asked.items():
        if manifest.spec.get(key) != value:
            return f"{key} ({manifest.spec.get(key)}, not {value})"
    if manifest.calibration is not None and (
        calibration is None or manifest.calibration.sha256 != calibration.record.sha256
    ):
        return "calibration"
    return None
