"""GGUF files among others: by their first bytes, as Ollama's blobs have no suffix, and by name."""

from __future__ import annotations

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


def holds_gguf(path: Path) -> bool:
    """Whether ``path`` is a GGUF, or a directory that has any, and no safetensors."""
    if not path.is_dir():
        return is_gguf(path)
    return not any(path.glob("*.safetensors*")) and any(map(is_gguf, path.iterdir()))
