"""GGUF files among others: by their first bytes, as Ollama's blobs have no suffix, and by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.errors import CheckpointError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is a file that holds a GGUF, or by its name should."""
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def gguf_at(path: Path) -> Path | None:
    """The GGUF that ``path`` is, or the only model in a directory that has no safetensors.

    Raise CheckpointError for a directory of several models.
    """
    if path.is_file():
        return path if is_gguf(path) else None
    if not path.is_dir() or any(path.glob("*.safetensors*")):
        return None
    found = [file for file in sorted(path.iterdir()) if is_gguf(file)]
    if len(found) > 1:
        found = _models(found)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path}: holds {len(found)} models; name one of {names}")
    return found[0] if found else None


def _models(files: Sequence[Path]) -> list[Path]:
    """Those that are whole models, or the first part of one: no projector, matrix or adapter."""
    from quantkit.formats.gguf.header import read_header

    found = []
    for file in files:
        metadata = read_header(file).metadata
        is_model = metadata.get("general.type", "model") == "model"
        is_first = metadata.get("split.no", 0) == 0
        if is_model and is_first and metadata.get("general.architecture") != "clip":
            found.append(file)
    return found
