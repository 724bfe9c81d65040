"""A run's directory: what was done already is found by content hash and not done again."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from quantkit.calibration import Calibration
from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.errors import RecipeError
from quantkit.files import remove_partials, sha256_json, write_json
from quantkit.ledger import REFERENCE
from quantkit.progress import say
from quantkit.spec import Spec
from quantkit.variant import Manifest, Model, Variant, open_variant

LEDGER = "ledger.json"
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

    def details(self, model: Model) -> Path:
        """Where the values behind a model's metrics go: one line a question, one a position."""
        return self.path / "details" / row_id(model)

    def variant(
        self,
        source: Checkpoint,
        spec: Spec,
        calibration: Calibration | None,
        *,
        force: bool = False,
    ) -> Variant:
        """The variant of this source, spec and calibration: the one that is there, or a new one.

        Raise RecipeError where another one stands in its place, unless ``force``.
        """
        place = self.path / "variants"
        existing = place / spec.directory
        if existing.exists():
            variant = open_variant(existing)
            other = _other_origin(variant.manifest, source, calibration)
            if other is None:
                say(f"{spec}: made already")
                return variant
            if not force:
                raise RecipeError(
                    f"{existing}: was made from another {other}; choose another --out, or pass "
                    "--force to replace it"
                )
        return convert(source, spec, calibration, place, force=force)

    def result(self, kind: str, model: Model, key: Any, make: Callable[[], T], shape: type[T]) -> T:
        """``make()``, or what it gave before for the same model and ``key`` (a JSON value).

        ``shape`` is the type that the stored JSON is read as.
        """
        adapter = TypeAdapter(shape)
        digest = sha256_json([kind, model_digest(model), key])
        path = self.path / "results" / f"{row_id(model)}-{kind}-{digest[:16]}.json"
        if path.is_file():
            try:
                stored = adapter.validate_json(path.read_bytes())
            except ValidationError:
                say(f"{path}: not readable; measuring again")
            else:
                say(f"{row_id(model)}: {kind} done already")
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
        remove_partials(path / "variants" / "*")
        directory.logs.mkdir(exist_ok=True)
        yield directory


def row_id(model: Model) -> str:
    """The id of a model's row in the ledger, which is also a file name."""
    return REFERENCE if isinstance(model, Checkpoint) else model.id


def model_digest(model: Model) -> str:
    """One digest for the files of a checkpoint or of a variant."""
    if isinstance(model, Checkpoint):
        return sha256_json(model.sha256)
    if model.manifest is None:
        raise RecipeError(f"{model.path}: has no manifest, so its results cannot be kept")
    return sha256_json({name: file.sha256 for name, file in model.manifest.files.items()})


def _other_origin(
    manifest: Manifest | None, source: Checkpoint, calibration: Calibration | None
) -> str | None:
    """What an existing variant was made from that is not what is asked for, or None."""
    if manifest is None or manifest.source.sha256 != source.sha256:
        return "source"
    if manifest.calibration is not None and (
        calibration is None or manifest.calibration.sha256 != calibration.record.sha256
    ):
        return "calibration"
    return None
