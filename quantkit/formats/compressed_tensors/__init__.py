"""The compressed-tensors format: what llm-compressor and quantkit write and vLLM reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import reading
from quantkit.formats.compressed_tensors.activations import QuantizedInputs
from quantkit.formats.compressed_tensors.encodings import encodings, refuse_key
from quantkit.formats.compressed_tensors.presets import named
from quantkit.formats.encoding import Decoded
from quantkit.formats.packed import Packed, Quantization, linears_of
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.tensors import tensors_in
from quantkit.models.variant import Variant

if TYPE_CHECKING:
    import torch


class CompressedTensors(Packed):
    """Integer and float weights, and what the inputs of linears are rounded to."""

    name = "compressed-tensors"

    def detect(self, path: Path) -> Variant | None:
        """As ``Format.detect``; the scheme has the preset's name where there is one, and those of
        all groups where there are several: ``W4A16+W8A16``."""
        found = super().detect(path)
        if found is None:
            return None
        quantization = Quantization.opened(path)
        with reading(quantization.file):
            names = [named(group) for group in quantization.config["config_groups"].values()]
        known = list(dict.fromkeys(name for name in names if name))
        scheme = found.scheme if None in names else "+".join(known)
        return Variant(found.id, path, self.name, scheme, None)

    def dequantize(self, variant: Variant) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``Format.dequantize``; raise IncompatibleVariant for what is not decoded."""
        decoded = _decoded(variant.path)
        for name in decoded.tensors:
            yield name, decoded.exact(name)

    def quantized_inputs(self, variant: Variant) -> QuantizedInputs | None:
        """As ``QuantizesInputs.quantized_inputs``."""
        quantization = Quantization.opened(variant.path)
        with reading(quantization.file):
            return QuantizedInputs.of(quantization, linears_of(tensors_in(variant.path)))


def _decoded(path: Path) -> Decoded:
    quantization = Quantization.opened(path)
    with reading(quantization.file):
        refuse_key(quantization.config, "kv_cache_scheme", quantization.file)
        found = encodings(quantization.config, quantization.file)
    return Decoded.of(Checkpoint.open(path), "compressed-tensors", found)
