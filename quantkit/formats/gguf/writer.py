"""Writes an unquantized GGUF (F32, F16, BF16) from a checkpoint, one tensor at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from quantkit.checkpoint import Checkpoint
from quantkit.errors import ConversionError
from quantkit.formats.gguf import architectures
from quantkit.formats.gguf.architectures import Tensor
from quantkit.formats.gguf.file_types import FILE_TYPES
from quantkit.formats.gguf.header import padded
from quantkit.formats.gguf.special_tokens import load_json
from quantkit.formats.gguf.tokenizer import read_tokenizer
from quantkit.progress import track

if TYPE_CHECKING:
    import torch


def model_name(checkpoint: Checkpoint) -> str:
    """A hub id's last part, or the directory's name: ``SmolLM2-135M``."""
    return checkpoint.id.rpartition("/")[2] if checkpoint.revision else checkpoint.path.name


def write(checkpoint: Checkpoint, scheme: str, path: Path, *, sparse: bool = False) -> None:
    """Write the checkpoint as ``scheme`` (``F32``, ``F16``, ``BF16``).

    ``sparse``: all but the tensors' data, which is left as a hole in a file of full size; no
    weights are read. Raise CheckpointError or ConversionError for what cannot be converted.
    """
    architecture = architectures.architecture_of(checkpoint)
    config = checkpoint.hf_config.to_dict()
    architectures.check_config(config)
    tensors = architectures.layout(checkpoint, config)

    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    _general(checkpoint, sum(int(np.prod(t.shape)) for t in tensors)).set_gguf_meta_model(writer)
    architectures.add_hyperparameters(writer, architecture, config, FILE_TYPES[scheme])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    read_tokenizer(checkpoint, config["vocab_size"]).write(writer)
    sizes = [_add_info(writer, tensor, scheme) for tensor in tensors]
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if not sparse:
            factors = architectures.rope_factors(config)
            for tensor in track(tensors, f"gguf: writing {scheme}"):
                weights = _read(checkpoint, tensor, factors)
                writer.write_tensor_data(_bytes(weights, _type(tensor, scheme), tensor.name))
    finally:
        writer.close()
    if sparse:
        os.truncate(path, padded(path.stat().st_size) + sum(padded(size) for size in sizes))


def _add_info(writer: gguf.GGUFWriter, tensor: Tensor, scheme: str) -> int:
    """Announce a tensor; returns its size in bytes."""
    kind = _type(tensor, scheme)
    dtype = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.uint16)
    size = int(np.prod(tensor.shape)) * dtype.itemsize
    writer.add_tensor_info(tensor.name, tensor.shape, dtype, size, raw_dtype=kind)
    return size


def _type(tensor: Tensor, scheme: str) -> gguf.GGMLQuantizationType:
    """Vectors and norms are float32 in every file: llama.cpp computes with nothing else there."""
    return gguf.GGMLQuantizationType["F32" if len(tensor.shape) == 1 else scheme]


def _read(checkpoint: Checkpoint, tensor: Tensor, rope_factors: list[float]) -> torch.Tensor:
    import torch

    if tensor.source is None:
        return torch.tensor(rope_factors, dtype=torch.float32)
    weights = checkpoint.read(tensor.source)
    return architectures.interleave(weights, tensor.heads) if tensor.heads else weights


def _bytes(
    weights: torch.Tensor, kind: gguf.GGMLQuantizationType, name: str
) -> np.ndarray[Any, Any]:
    """The values in the file's type, rounded to nearest even; 16-bit ones as their bits."""
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
    stored = weights.to(dtype).contiguous()
    if dtype == torch.float16 and torch.isinf(stored).any() and not torch.isinf(weights).any():
        raise ConversionError(
            f"gguf: {name} holds {weights.abs().max():.3g}, more than float16 can; use BF16 or F32"
        )
    array: np.ndarray[Any, Any] = (
        stored.numpy() if dtype == torch.float32 else stored.view(torch.int16).numpy()
    )
    return array


def _general(checkpoint: Checkpoint, parameters: int) -> gguf.Metadata:
    """The ``general.*`` keys: name, size label, and what the model card and the generation config
    say; ``gguf``'s own reading of them, which llama.cpp's converter uses too."""
    named = {"_name_or_path": checkpoint.id} if checkpoint.revision else checkpoint.config
    metadata = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(),
        gguf.Metadata.load_model_card(checkpoint.path),
        named,
        Path(model_name(checkpoint)),
        parameters,
    )
    metadata.name = metadata.name or model_name(checkpoint)
    metadata.size_label = metadata.size_label or gguf.size_label(parameters, parameters, 0, 0)
    sampling = load_json(checkpoint.path / "generation_config.json")
    metadata.sampling_top_k = sampling.get("top_k")
    metadata.sampling_top_p = sampling.get("top_p")
    metadata.sampling_min_p = sampling.get("min_p")
    metadata.sampling_temp = sampling.get("temperature")
    metadata.sampling_penalty_repeat = sampling.get("repetition_penalty")
    return metadata
