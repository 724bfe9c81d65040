"""What a GGUF says about itself, ours or others', whole or in parts: for ``quantkit inspect``."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError
from quantkit.formats.gguf import file_types
from quantkit.formats.gguf.model_file import (
    ModelFile,
    StoredTensor,
    group_of,
    stored_bytes,
    type_name,
)
from quantkit.formats.gguf.oddities import oddities

_SPECIAL = re.compile(r"tokenizer\.ggml\.(\w+)_token_id")
_LISTED = 8
"""Longer arrays of metadata are only counted."""


def inspect(path: Path) -> dict[str, Any]:
    """Facts about the GGUF at ``path``, the first part where it has several, as JSON values.

    Reads metadata and a few values of each tensor. Raise CheckpointError for what is no GGUF.
    """
    model = ModelFile.open(path)
    metadata = model.metadata
    stored = sum(map(_bytes, model.tensors))
    parameters = sum(math.prod(tensor.shape) for tensor in model.tensors)
    return {
        "name": metadata.get("general.name"),
        "type": metadata.get("general.type", "model"),
        "architecture": model.architecture,
        "file_type": file_types.name_of(metadata.get("general.file_type")),
        "parameters": parameters,
        "bytes": model.bytes,
        "bits_per_weight": stored * 8 / parameters if parameters else None,
        "parts": [file.name for file in model.files] if len(model.headers) > 1 else [],
        "context_length": metadata.get(f"{model.architecture}.context_length"),
        "tokenizer": metadata.get("tokenizer.ggml.model"),
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        "vocabulary": len(model.array("tokenizer.ggml.tokens")),
        "special_tokens": _special_tokens(model),
        "chat_template": "tokenizer.chat_template" in metadata,
        "imatrix": _imatrix(metadata),
        "tensors": len(model.tensors),
        "tensor_types": _types(model),
        "tensor_groups": _groups(model),
        "metadata": {key: _shown(value) for key, value in metadata.items()},
        "oddities": oddities(model),
    }


def _bytes(tensor: StoredTensor) -> int:
    try:
        return stored_bytes(tensor)
    except CheckpointError:
        return 0  # of a type unknown here, which is among the oddities


def _types(model: ModelFile) -> dict[str, dict[str, int]]:
    """How many tensors of each type there are, and what they take."""
    types: dict[str, dict[str, int]] = {}
    for tensor in model.tensors:
        entry = types.setdefault(type_name(tensor.type), {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += _bytes(tensor)
    return dict(sorted(types.items()))


def _groups(model: ModelFile) -> dict[str, dict[str, int]]:
    """The number of tensors of each type, by group."""
    groups: dict[str, Counter[str]] = {}
    for tensor in model.tensors:
        groups.setdefault(group_of(tensor.name), Counter())[type_name(tensor.type)] += 1
    return {group: dict(types) for group, types in sorted(groups.items())}


def _special_tokens(model: ModelFile) -> dict[str, dict[str, Any]]:
    """The token and its id, by role (``bos``, ``eos``)."""
    tokens = model.array("tokenizer.ggml.tokens")
    return {
        match[1]: {"id": value, "token": tokens[value] if value in range(len(tokens)) else None}
        for key, value in model.metadata.items()
        if (match := _SPECIAL.fullmatch(key))
    }


def _imatrix(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """The importance matrix that the file was quantized with, by its metadata; or is one."""
    found = {
        key.rpartition(".")[2]: value
        for key, value in metadata.items()
        if key.startswith(("quantize.imatrix.", "imatrix."))
    }
    return found or None


def _shown(value: Any) -> Any:
    return f"{len(value)} values" if isinstance(value, list) and len(value) > _LISTED else value
