"""Make variants: plan each, write it beside its final place, describe it, move it there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import ConversionError, QuantkitError
from quantkit.formats.detect import open_variant, written
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import (
    MANIFEST,
    ConvertCost,
    FileRecord,
    Manifest,
    ProofRecord,
    SourceRecord,
    Variant,
    read_manifest,
)
from quantkit.producers import load_producer
from quantkit.producers.base import Converted, Plan, SharesReading
from quantkit.producers.proof import tokens
from quantkit.producers.proof.chat import prove_chat
from quantkit.system import devices
from quantkit.system.files import (
    partial_directory,
    remove_partials,
    settle,
    sha256_file,
    sha256_json,
)
from quantkit.system.memory import PeakMemory
from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration

_SPARE_BYTES = 64 << 20
"""Room on the disk beyond the weights: tokenizer, manifest, the file system's own needs."""


def plan(checkpoint: Checkpoint, spec: Spec, *, allow_tokenizer_differences: bool = False) -> Plan:
    """What converting would give, or the error that it would meet; reads no tensor data."""
    if checkpoint.format == "gguf" != spec.format:
        raise ConversionError(
            f"{spec}: {checkpoint.id} is a GGUF, from which only other GGUF files can be made; "
            "convert from the checkpoint"
        )
    planned = load_producer(spec).plan(checkpoint, spec)
    if not allow_tokenizer_differences:
        _refuse_other_tokens(spec, checkpoint, planned.tokenizer_differences)
    return replace(planned, notes=(*checkpoint.notes, *planned.notes))


def _refuse_other_tokens(spec: Spec, checkpoint: Checkpoint, differences: Sequence[str]) -> None:
    for difference in differences:
        raise ConversionError(
            f"{spec}: {checkpoint.path}: {difference}; to make it anyway, pass "
            "--allow-tokenizer-differences (in a recipe: allow_tokenizer_differences: true)"
        )


def convert(
    checkpoint: Checkpoint,
    spec: Spec,
    calibration: Calibration | None,
    out: Path,
    *,
    force: bool = False,
    allow_tokenizer_differences: bool = False,
) -> Variant:
    """Make the variant ``spec`` of ``checkpoint`` in ``out/<format>-<scheme>``, or by its name.

    It exists whole or not at all; one that exists already is an error unless ``force``. Formats
    that need no calibration ignore it. One that reads text by other token ids than the source's
    tokenizer.json is an error unless ``allow_tokenizer_differences``. Raise ConversionError,
    RecipeError or CheckpointError.
    """
    allow = allow_tokenizer_differences
    many = convert_many(
        checkpoint, [spec], calibration, out, force=force, allow_tokenizer_differences=allow
    )
    made = many[spec]
    if isinstance(made, Exception):
        raise made
    return made


def convert_many(
    checkpoint: Checkpoint,
    specs: Sequence[Spec],
    calibration: Calibration | None,
    out: Path,
    *,
    force: bool = False,
    allow_tokenizer_differences: bool = False,
) -> dict[Spec, Variant | Exception]:
    """The variant of each spec, or its error, which does not keep the others from being made."""
    made: dict[Spec, Variant | Exception] = {}
    for group in groups(specs):
        made |= _convert_group(
            checkpoint,
            group,
            calibration,
            out,
            force=force,
            allow_tokenizer_differences=allow_tokenizer_differences,
        )
    return made


def groups(specs: Sequence[Spec]) -> list[list[Spec]]:
    """The specs that are made in one pass over the source, together; the others alone."""
    found: dict[object, list[Spec]] = {}
    for spec in specs:
        together = isinstance(load_producer(spec), SharesReading)
        found.setdefault(spec.format if together else spec, []).append(spec)
    return list(found.values())


def _convert_group(
    checkpoint: Checkpoint,
    specs: Sequence[Spec],
    calibration: Calibration | None,
    out: Path,
    *,
    force: bool,
    allow_tokenizer_differences: bool,
) -> dict[Spec, Variant | Exception]:
    made: dict[Spec, Variant | Exception] = {}
    plans: dict[Spec, Plan] = {}
    targets: dict[Spec, Path] = {}
    with ExitStack() as partials:
        for spec in specs:
            final = out / spec.directory
            try:
                planned = plan(
                    checkpoint, spec, allow_tokenizer_differences=allow_tokenizer_differences
                )
                require_space(out, planned.bytes, str(spec))
                resume = _resume_key(checkpoint, spec, calibration)
                remove_partials(final, keep=resume)
                partial = partial_directory(final, force=force, resume=resume)
                targets[spec] = partials.enter_context(partial)
                plans[spec] = planned
            except (QuantkitError, OSError) as error:
                made[spec] = error
        started = time.monotonic()
        with PeakMemory() as memory, ThreadPoolExecutor(1, "hash-source") as pool:
            if targets:
                pool.submit(lambda: checkpoint.sha256)  # kept there; the manifests want it
            converted = _write(checkpoint, targets, calibration)
        seconds = time.monotonic() - started
        made |= {spec: error for spec, error in converted.items() if isinstance(error, Exception)}
        for spec, result in converted.items():
            if isinstance(result, Exception):
                continue
            used = calibration if plans[spec].needs_calibration else None
            cost = ConvertCost(
                seconds=seconds,
                peak_rss_bytes=result.peak_rss_bytes or memory.peak_bytes,
                device=devices.describe(used.device) if used else None,
                precision=str(used.precision).removeprefix("torch.") if used else None,
                peak_device_bytes=result.peak_device_bytes,
                stage_seconds=result.stage_seconds,
                variants=len(targets),
            )
            try:
                _copy_sidecars(checkpoint, targets[spec])
                proof, override_kv = _prove(
                    checkpoint, spec, targets[spec], allow_differences=allow_tokenizer_differences
                )
                _describe(
                    checkpoint,
                    plans[spec],
                    result,
                    calibration=used,
                    cost=cost,
                    proof=proof,
                    override_kv=override_kv,
                    directory=targets[spec],
                )
                settle(targets[spec], out / spec.directory)
                made[spec] = open_variant(out / spec.directory)
            except QuantkitError as error:
                made[spec] = error
            except OSError as error:
                made[spec] = ConversionError(f"{out / spec.directory}: {error}")
    return made


def _prove(
    checkpoint: Checkpoint, spec: Spec, directory: Path, *, allow_differences: bool
) -> tuple[dict[str, ProofRecord], dict[str, int]]:
    """What was written against the source, and the metadata that llama-server has to be told.

    For a GGUF that quantkit made, the findings of its own conversion are taken over. Raise
    ConversionError where it is another model."""
    beside = checkpoint.path / MANIFEST
    if checkpoint.format == "gguf" and beside.is_file():
        manifest = read_manifest(beside)
        return manifest.proof, manifest.override_kv
    proof: dict[str, ProofRecord] = {}
    variant = written(directory, spec.format, spec.scheme)
    compared = tokens.of_variant(checkpoint, variant)
    if compared is not None:
        if not allow_differences:
            _refuse_other_tokens(spec, checkpoint, compared.differences)
        found = [*compared.remarks, *compared.differences]
        proof["tokens"] = ProofRecord(compared=compared.compared, differences=found)
    chat = prove_chat(checkpoint, variant)
    if chat.compared:
        proof["chat"] = ProofRecord(compared=chat.compared, differences=chat.notes)
    return proof, chat.override


def _copy_sidecars(checkpoint: Checkpoint, directory: Path) -> None:
    # The manifest is of an attempt that was killed when all but the final name was there.
    (directory / MANIFEST).unlink(missing_ok=True)
    for file in checkpoint.sidecars:
        copy = directory / file.relative_to(checkpoint.path)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _resume_key(checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None) -> str | None:
    """A hash of everything that the weights depend on; None where each attempt starts again."""
    if calibration is None or not load_producer(spec).resumes:
        return None
    what = [
        __version__,
        checkpoint.sha256,
        [str(spec), spec.options],
        calibration.record.model_dump(),
        [calibration.device.type, str(calibration.precision)],
    ]
    return sha256_json(what)[:16]


def _write(
    checkpoint: Checkpoint, targets: dict[Spec, Path], calibration: Calibration | None
) -> Mapping[Spec, Converted | Exception]:
    if not targets:
        return {}
    spec, directory = next(iter(targets.items()))
    producer = load_producer(spec)
    if isinstance(producer, SharesReading):
        return producer.convert_many(checkpoint, targets, calibration)
    try:
        return {spec: producer.convert(checkpoint, spec, calibration, directory)}
    except Exception as error:  # the caller's to raise, after the others are made
        return {spec: error}


def _describe(
    checkpoint: Checkpoint,
    planned: Plan,
    converted: Converted,
    *,
    calibration: Calibration | None,
    cost: ConvertCost,
    proof: dict[str, ProofRecord],
    override_kv: dict[str, int],
    directory: Path,
) -> None:
    """Add the manifest."""
    told = [line for record in proof.values() for line in record.differences]
    notes = [*planned.notes, *converted.notes, *told]
    manifest = Manifest(
        source=SourceRecord(
            id=checkpoint.id,
            revision=checkpoint.revision,
            sha256=checkpoint.sha256,
            merged=checkpoint.merged,
        ),
        spec={
            "format": planned.spec.format,
            "scheme": planned.spec.scheme,
            "producer": planned.spec.producer,
            **planned.options,
            **converted.options,
        },
        calibration=calibration.record if calibration else None,
        tools={"quantkit": __version__, **converted.tools},
        files={
            name: FileRecord(
                sha256=converted.sha256.get(name) or sha256_file(file), bytes=file.stat().st_size
            )
            for file in sorted(directory.rglob("*"))
            if file.is_file()
            for name in [str(file.relative_to(directory))]
        },
        parameters=checkpoint.parameters,
        bits_per_weight=converted.bits_per_weight,
        bits_per_weight_quantized=converted.bits_per_weight_quantized,
        convert=cost,
        blocks=list(converted.blocks),
        structure=list(converted.structure),
        held_out=converted.held_out,
        proof=proof,
        override_kv=override_kv,
        notes=list(dict.fromkeys(notes)),
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def require_space(directory: Path, needed: int, what: str) -> None:
    """Raise ConversionError where the disk under ``directory`` has less than ``needed`` bytes."""
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE_BYTES:
        raise ConversionError(
            f"{directory}: {what} needs {needed / 1e9:.2f} GB and the disk has "
            f"{free / 1e9:.2f} GB left; free some or choose another --out"
        )
