"""JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, read as transformers reads it: UTF-8 without a byte order mark.

    Raise CheckpointError where there is no such file, or something else in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        if path.read_bytes().startswith(b"\xef\xbb\xbf"):
            raise CheckpointError(
                f"{path}: begins with a byte order mark, which transformers does not read; save it "
                "as UTF-8 without one"
            ) from error
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def load_json(path: Path) -> dict[str, Any]:
    """As ``read_object``; empty where there is no such file."""
    return read_object(path) if path.is_file() else {}
