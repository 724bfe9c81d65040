"""How large a GGUF will be, tensor by tensor, and how large one is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.formats.gguf import quantize, writer
from quantkit.formats.gguf.file_types import UNQUANTIZED
from quantkit.formats.gguf.header import Header, TensorHeader, padded, read_header


@dataclass(frozen=True)
class TensorSize:
    """``type`` in ggml's words: ``Q4_K``."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its data, without padding."""
        block: int
        size: int
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return math.prod(self.shape) // block * size

    @property
    def numel(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Sizes:
    """A GGUF's tensors; ``file_bytes`` with its metadata and padding, ``work_bytes`` what making
    it takes on disk: itself, and the unquantized file that it is made from."""

    tensors: tuple[TensorSize, ...]
    file_bytes: int
    work_bytes: int
    notes: tuple[str, ...] = ()

    def bits_per_weight(self, parameters: int) -> float:
        """Bytes of all tensors x 8 / ``parameters``."""
        return sum(tensor.bytes for tensor in self.tensors) * 8 / parameters

    def bits_per_weight_quantized(self) -> float | None:
        """The same over the blocks' matrices of a quantized type; None where there is none."""
        quantized = [
            tensor
            for tensor in self.tensors
            if tensor.name.startswith("blk.")
            and len(tensor.shape) == 2
            and tensor.type not in UNQUANTIZED
        ]
        if not quantized:
            return None
        return sum(t.bytes for t in quantized) * 8 / sum(t.numel for t in quantized)


def predict(checkpoint: Checkpoint, scheme: str, base: str) -> Sizes:
    """The sizes of the file that ``scheme`` will give, exactly; reads no tensor data.

    A file with all metadata and a hole for the data is written, quantized from ``base`` (see
    ``GGUF.convert``) in llama.cpp's dry run, and deleted.
    """
    with TemporaryDirectory(prefix="quantkit-") as directory:
        skeleton = Path(directory) / "skeleton.gguf"
        writer.write(checkpoint, base, skeleton, sparse=True)
        header = read_header(skeleton)
        if scheme == base:
            return measure(skeleton)
        found = quantize.forecast(skeleton, scheme)
        return _sizes(found.types, header, skeleton.stat().st_size, found.notes)


def measure(path: Path) -> Sizes:
    """The sizes of the tensors in a file; raise CheckpointError for an unreadable one."""
    header = read_header(path)
    return _sizes({t.name: _type_name(t) for t in header.tensors}, header)


def _sizes(
    types: dict[str, str], header: Header, base_bytes: int = 0, notes: tuple[str, ...] = ()
) -> Sizes:
    tensors = tuple(TensorSize(t.name, types[t.name], t.shape) for t in header.tensors)
    total = header.data_offset + sum(padded(tensor.bytes) for tensor in tensors)
    return Sizes(tensors, total, total + base_bytes, notes)


def _type_name(tensor: TensorHeader) -> str:
    try:
        return str(gguf.GGMLQuantizationType(tensor.type).name)
    except ValueError as error:
        raise CheckpointError(
            f"{tensor.name} has tensor type {tensor.type}, which this version of the package gguf "
            "does not know; upgrade it"
        ) from error
