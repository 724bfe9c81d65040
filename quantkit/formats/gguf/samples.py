"""A few values of each tensor of a GGUF, to see whether they are numbers at all."""

from __future__ import annotations

import numpy as np

from quantkit.errors import CheckpointError
from quantkit.formats.gguf import ggml
from quantkit.formats.gguf.model_file import ModelFile, StoredTensor, read_bytes

_SPOTS = 4
"""How many places of a tensor are looked at, its first and its last among them."""
_SPOT_VALUES = 1024


def suspicious(model: ModelFile) -> tuple[list[str], list[str]]:
    """Names of tensors with NaN or infinity in a place that was looked at, and of matrices of
    which all those places are zero."""
    not_finite, zero = [], []
    for tensor in model.tensors:
        sample = _sample(tensor)
        if not sample:
            continue
        if not ggml.is_valid(tensor.type, sample, len(sample)):
            not_finite.append(tensor.name)
        elif len(tensor.shape) > 1 and not any(sample):
            zero.append(tensor.name)
    return not_finite, zero


def _sample(tensor: StoredTensor) -> bytes:
    """Whole blocks from all over the tensor; none where they cannot be read."""
    kind = ggml.numbered(tensor.type)
    try:
        data = read_bytes(tensor)
    except CheckpointError:
        return b""
    if kind is None:
        return b""
    blocks = data[: len(data) // kind.bytes * kind.bytes].reshape(-1, kind.bytes)
    run = max(1, _SPOT_VALUES // kind.block)
    starts = np.linspace(0, max(0, len(blocks) - run), _SPOTS, dtype=np.int64)
    return b"".join(blocks[start : start + run].tobytes() for start in starts)
