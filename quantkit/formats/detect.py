"""Open whatever an engine can load: variants, ours or others', and checkpoints."""

from __future__ import annotations

from pathlib import Path

from quantkit import registry
from quantkit.errors import CheckpointError
from quantkit.formats import load_format
from quantkit.formats.decoded import open_decoded
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.gguf_files import SUFFIX, holds_gguf
from quantkit.models.variant import MANIFEST, Model, Variant, read_manifest


def open_model(source: str | Path) -> Model:
    """Open a variant where ``source`` is one, else a checkpoint."""
    return _variant_at(Path(source).expanduser().absolute()) or open_decoded(source)


def open_variant(path: Path) -> Variant:
    """Open a variant's directory, a GGUF file or the only one of a directory, or a packed
    checkpoint of others.

    Raise CheckpointError where ``path`` is none of these or its manifest is unreadable,
    IncompatibleVariant where it is quantized in a way that is not read.
    """
    path = path.expanduser().absolute()
    found = _variant_at(path)
    if found is None:
        raise CheckpointError(
            f"{path}: not a variant (no {MANIFEST}, no .gguf file, no config.json that names a "
            "quantization)"
        )
    return found


def open_source(source: str | Path, *, allow_requantize: bool = False) -> Checkpoint:
    """What variants are made from: a checkpoint, decoded where quantized, or a GGUF in its place.

    Raise ConversionError for a GGUF that is quantized, unless ``allow_requantize``.
    """
    path = Path(source).expanduser().absolute()
    if path.suffix.lower() == SUFFIX or (path / MANIFEST).is_file() or holds_gguf(path):
        variant = open_variant(path)
        found = load_format(variant.format).source(variant, allow_requantize=allow_requantize)
        if found is not None:
            return found
    return open_decoded(source)


def written(path: Path, format_: str, scheme: str) -> Variant:
    """What was just written into ``path``, before it has a manifest."""
    names = [file.name for file in path.iterdir()]
    return Variant(path.name, path, format_, scheme, None, load_format(format_).files(path, names))


def _variant_at(path: Path) -> Variant | None:
    if path.suffix.lower() == SUFFIX and not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if (path / MANIFEST).is_file():
        return _with_manifest(path)
    for name in registry.FORMATS:
        found = load_format(name).detect(path)
        if found is not None:
            return _of_its_directory(found) or found
    return None


def _of_its_directory(found: Variant) -> Variant | None:
    """The variant whose file somebody named instead of its directory."""
    directory = found.path.parent
    if not found.path.is_file() or not (directory / MANIFEST).is_file():
        return None
    variant = _with_manifest(directory)
    return variant if found.path in variant.files else None


def _with_manifest(path: Path) -> Variant:
    manifest = read_manifest(path / MANIFEST)
    format_, scheme = manifest.spec["format"], manifest.spec["scheme"]
    files = load_format(format_).files(path, list(manifest.files))
    return Variant(path.name, path, format_, scheme, manifest, files)
