"""Make one variant: plan it, write it beside its final place, describe it, move it there."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import quantkit
from quantkit.checkpoint import Checkpoint
from quantkit.errors import ConversionError
from quantkit.files import new_directory, remove_partials, sha256_file
from quantkit.formats import load_format
from quantkit.memory import PeakMemory
from quantkit.spec import Spec
from quantkit.variant import (
    MANIFEST,
    ConvertCost,
    FileRecord,
    Manifest,
    SourceRecord,
    Variant,
    open_variant,
)

if TYPE_CHECKING:
    from quantkit.calibration import Calibration
    from quantkit.formats.base import Plan

_SPARE_BYTES = 64 << 20
"""Room on the disk beyond the weights: tokenizer, manifest, the file system's own needs."""


def plan(checkpoint: Checkpoint, spec: Spec) -> Plan:
    """What converting would give, or the error that it would meet; reads no tensor data."""
    return load_format(spec.format).plan(checkpoint, spec)


def convert(
    checkpoint: Checkpoint,
    spec: Spec,
    calibration: Calibration | None,
    out: Path,
    *,
    force: bool = False,
) -> Variant:
    """Make the variant ``spec`` of ``checkpoint`` in ``out/<format>-<scheme>``.

    It exists whole or not at all; one that exists already is an error unless ``force``. Formats
    that need no calibration ignore it. Raise ConversionError, RecipeError or CheckpointError.
    """
    planned = plan(checkpoint, spec)
    final = out / spec.directory
    require_space(out, planned.bytes, str(spec))
    if not planned.needs_calibration:
        calibration = None
    remove_partials(final)
    with new_directory(final, force=force) as partial:
        started = time.monotonic()
        with PeakMemory() as memory:
            converted = load_format(spec.format).convert(checkpoint, spec, calibration, partial)
        seconds = time.monotonic() - started
        for file in checkpoint.sidecars:
            shutil.copyfile(file, partial / file.name)
        manifest = Manifest(
            source=SourceRecord(
                id=checkpoint.id, revision=checkpoint.revision, sha256=checkpoint.sha256
            ),
            spec={
                "format": spec.format,
                "scheme": spec.scheme,
                "producer": "native",
                **converted.options,
            },
            calibration=calibration.record if calibration else None,
            tools={"quantkit": quantkit.__version__, **converted.tools},
            files={
                file.name: FileRecord(sha256=sha256_file(file), bytes=file.stat().st_size)
                for file in sorted(partial.iterdir())
            },
            parameters=checkpoint.parameters,
            bits_per_weight=converted.bits_per_weight,
            bits_per_weight_quantized=converted.bits_per_weight_quantized,
            convert=ConvertCost(seconds=seconds, peak_rss_bytes=memory.peak_bytes),
            notes=[*planned.notes, *(n for n in converted.notes if n not in planned.notes)],
        )
        (partial / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return open_variant(final)


def require_space(directory: Path, needed: int, what: str) -> None:
    """Raise ConversionError where the disk under ``directory`` has less than ``needed`` bytes."""
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE_BYTES:
        raise ConversionError(
            f"{directory}: {what} needs {needed / 1e9:.2f} GB and the disk has "
            f"{free / 1e9:.2f} GB left; free some or choose another --out"
        )
