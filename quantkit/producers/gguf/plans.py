"""What one GGUF file will be, to the byte: no weight is read for it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from gguf import GGML_QUANT_VERSION
from gguf import GGUFValueType as ValueType
from numpy.typing import NDArray

from quantkit.errors import ConversionError, RecipeError
from quantkit.formats.gguf import ggml
from quantkit.formats.gguf.fields import Metadata, packed
from quantkit.formats.gguf.file_types import FILE_TYPES
from quantkit.formats.gguf.ggml import TensorType
from quantkit.formats.gguf.imatrix import ImportanceMatrix
from quantkit.models.variant import IMATRIX
from quantkit.producers.gguf.content import Content, ContentTensor
from quantkit.producers.gguf.layout import Layout, lay_out
from quantkit.producers.gguf.options import Options
from quantkit.producers.gguf.type_assignment import Forecast, forecast

_CONVERTERS_SPLIT = ("split.no", "split.count", "split.tensors.count")
_SPLITTERS_SPLIT = ("split.no", "split.tensors.count", "split.count")
"""llama.cpp's converter and its llama-gguf-split write the same keys, each in its own order."""

_NEED_MATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
"""Types that are garbage without an importance matrix: llama.cpp refuses, but for embeddings and
the output layer."""
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


@dataclass(frozen=True, eq=False)
class FilePlan:
    """One GGUF: what stands where, and by what its columns are weighed."""

    scheme: str
    layout: Layout
    notes: tuple[str, ...]
    matrix: ImportanceMatrix | None

    @cached_property
    def types(self) -> dict[str, TensorType]:
        """The plans of all tensors, in file order."""
        return {place.tensor.name: place.type for place in self.layout.places}

    def bits_per_weight(self, parameters: int) -> float:
        """Bytes of all tensors x 8 / ``parameters``."""
        stored = sum(place.type.stored_bytes(place.tensor.shape) for place in self.layout.places)
        return stored * 8 / parameters

    def bits_per_weight_quantized(self) -> float | None:
        """The same over the blocks' matrices of a quantized type; None where there is none."""
        quantized = [
            place
            for place in self.layout.places
            if place.tensor.name.startswith("blk.")
            and len(place.tensor.shape) > 1
            and place.type.block > 1
        ]
        if not quantized:
            return None
        stored = sum(place.type.stored_bytes(place.tensor.shape) for place in quantized)
        return stored * 8 / sum(math.prod(place.tensor.shape) for place in quantized)

    def weights(self, tensor: ContentTensor) -> NDArray[np.float32] | None:
        """The importance of the tensor's columns, matrix after matrix; None where all weigh alike,
        or its type does not heed it."""
        if self.matrix is None or self.types[tensor.name].block == 1:
            return None
        found = self.matrix.weights(tensor.name)
        if found is None or found.size != _weights_of(tensor):
            return None
        return np.ascontiguousarray(found, dtype=np.float32)


def plan_file(
    content: Content, scheme: str, options: Options, computed: ImportanceMatrix | None = None
) -> FilePlan:
    """The file that ``scheme`` and ``options`` give. ``computed`` is the importance matrix of
    ``imatrix: true``; before it is known the size is exact but for the name of its text.

    Raise RecipeError or ConversionError for what llama.cpp would not make.
    """
    tensors = {tensor.name: tensor for tensor in content.tensors}
    size = options.split_max_size
    if is_direct(content, scheme, options):
        metadata = _metadata(content) | {"general.file_type": _number(FILE_TYPES[scheme])}
        kinds = [(t, ggml.types()[content.type_of(t, scheme)]) for t in tensors.values()]
        return FilePlan(scheme, lay_out(metadata, kinds, size, _CONVERTERS_SPLIT), (), None)
    matrix = computed
    if isinstance(options.imatrix, str):
        path = Path(options.imatrix).expanduser()
        matrix = _matrix(path, path.stat().st_mtime_ns)
    found = _forecast(content, scheme, replace(options, imatrix=bool(options.imatrix)))
    kinds = [(tensors[name], ggml.types()[kind]) for name, kind in found.types.items()]
    for tensor, kind in kinds:
        _check(tensor, kind, scheme, options, matrix)
    metadata = _quantized(_metadata(content), scheme) | _matrix_keys(options, matrix)
    layout = lay_out(metadata, kinds, size, _SPLITTERS_SPLIT, shortened=True)
    notes = (*found.notes, *(matrix.notes() if matrix else ()))
    return FilePlan(scheme, layout, notes, matrix)


def is_direct(content: Content, scheme: str, options: Options) -> bool:
    """Whether the tensors are written as they are, and not as llama.cpp's quantizer chooses."""
    return scheme in content.direct and not (options.output_type or options.embedding_type)


@lru_cache(maxsize=1)
def _matrix(path: Path, _changed: int) -> ImportanceMatrix:
    """One object for all files of a pass, which then share what they make with it."""
    return ImportanceMatrix.read(path)


@lru_cache(maxsize=1)
def _metadata(content: Content) -> dict[str, bytes]:
    return content.metadata()


@lru_cache(maxsize=64)
def _forecast(content: Content, scheme: str, options: Options) -> Forecast:
    """Ask llama.cpp, by a file with all metadata and a hole for the data, which is deleted."""
    kinds = [(t, ggml.types()[content.type_of(t, content.base)]) for t in content.tensors]
    (part,) = lay_out(_metadata(content), kinds, None, ()).parts
    with TemporaryDirectory(prefix="quantkit-") as directory:
        skeleton = Path(directory) / "skeleton.gguf"
        skeleton.write_bytes(part.header)
        os.truncate(skeleton, part.bytes)
        return forecast(skeleton, scheme, options)


def _quantized(metadata: Metadata, scheme: str) -> dict[str, bytes]:
    """The keys of a quantized file; llama.cpp moves those that it sets to the end."""
    set_by_quantizer = {
        "general.quantization_version": _number(GGML_QUANT_VERSION),
        "general.file_type": _number(FILE_TYPES[scheme]),
    }
    return {k: v for k, v in metadata.items() if k not in set_by_quantizer} | set_by_quantizer


def _matrix_keys(options: Options, matrix: ImportanceMatrix | None) -> dict[str, bytes]:
    if not options.imatrix:
        return {}
    file = options.imatrix if isinstance(options.imatrix, str) else IMATRIX
    keys = {"quantize.imatrix.file": _text(file)}
    if matrix is None or matrix.datasets:
        keys["quantize.imatrix.dataset"] = _text(matrix.datasets[0] if matrix else "")
    keys["quantize.imatrix.entries_count"] = _number(len(matrix.entries) if matrix else 0)
    if matrix is None or matrix.chunks > 0:
        keys["quantize.imatrix.chunks_count"] = _number(matrix.chunks if matrix else 0)
    return keys


def _number(value: int) -> bytes:
    return packed(value, ValueType.UINT32)


def _text(value: str) -> bytes:
    """llama-quantize keeps the first 127 bytes."""
    return packed(value.encode()[:127], ValueType.STRING)


def _check(
    tensor: ContentTensor,
    kind: TensorType,
    scheme: str,
    options: Options,
    matrix: ImportanceMatrix | None,
) -> None:
    """Raise RecipeError or ConversionError for what would end llama.cpp's quantizer, or worse."""
    columns = tensor.shape[-1]
    if columns % kind.block:  # where the user named the type: there llama.cpp looks for no other
        raise RecipeError(
            f"gguf: {tensor.name} cannot be of {kind.name}: its {columns} columns do not divide "
            f"by {kind.block}; name another type"
        )
    found = matrix.weights(tensor.name) if matrix else None
    if found is not None and found.size != _weights_of(tensor) and kind.block > 1:
        if tensor.name not in _EMBEDDINGS:
            raise ConversionError(
                f"gguf: the importance matrix has {found.size} values for {tensor.name}, which has "
                f"{_weights_of(tensor)} columns: it was made from another model"
            )
        found = None
    garbage = kind.name in _NEED_MATRIX or (kind.name == "Q2_K" and scheme == "Q2_K_S")
    garbage = garbage and tensor.name not in (*_EMBEDDINGS, "output.weight")
    if not garbage and not ggml.requires_weights(kind.number):
        return
    if not options.imatrix:
        raise RecipeError(
            f"gguf: {scheme} makes {tensor.name} {kind.name}, which needs an importance matrix: "
            "imatrix: true computes one from the calibration text (--imatrix auto), or name a file"
        )
    if matrix is not None and found is None:
        raise ConversionError(
            f"gguf: {scheme} makes {tensor.name} {kind.name}, and the importance matrix does not "
            "cover it; choose another type for it (tensor_types) or a matrix from more text"
        )


def _weights_of(tensor: ContentTensor) -> int:
    """How many values an importance matrix has for it: one a column of each matrix of a stack."""
    return tensor.shape[-1] * (tensor.shape[0] if len(tensor.shape) == 3 else 1)
