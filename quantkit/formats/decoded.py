"""Quantized checkpoints as sources: whichever way one is stored, it reads as plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, IncompatibleVariant
from quantkit.formats import awq, decoding, gptq
from quantkit.formats.compressed_tensors.encodings import encodings
from quantkit.formats.encoding import Decoded, Encoding, Shape, block_size, scaled
from quantkit.formats.packed import Quantization
from quantkit.models.checkpoint import Checkpoint
from quantkit.system.json_file import read_object


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` itself where it is plain, else as a source whose weights are decoded.

    Raise IncompatibleVariant for a quantization that cannot be decoded, CheckpointError where its
    tensors do not fit.
    """
    file = checkpoint.path / "config.json"
    config = read_object(file).get("quantization_config")
    if config is None and (beside := Quantization.of(checkpoint.path)):
        config = beside.config
    if config is None:
        return checkpoint
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: quantization_config is {config!r}, expected an object")
    method = config.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return Decoded.of(checkpoint, str(method), _fp8(config, file))
    if method == "mxfp4":
        return Decoded.of(checkpoint, "mxfp4", [_MXFP4])
    if method == "compressed-tensors":
        name = f"compressed-tensors, {config.get('format')}"
        return Decoded.of(checkpoint, name, encodings(config, file))
    if method in ("gptq", "awq", "auto-round", "intel/auto-round"):
        quantization = Quantization.opened(checkpoint.path)
        return Decoded.of(checkpoint, str(method), [_integers(quantization)])
    raise IncompatibleVariant(
        f"{file}: quant_method is {method!r}, which quantkit does not decode; it decodes fp8, "
        "fbgemm_fp8, mxfp4, compressed-tensors, gptq, awq and auto-round"
    )


def open_decoded(source: str | Path) -> Checkpoint:
    """As ``Checkpoint.open``, and decoded where it is quantized."""
    return decoded(Checkpoint.open(source))


def _fp8(config: Mapping[str, Any], file: Path) -> list[Encoding]:
    block = block_size(config.get("weight_block_size"), file)
    if config["quant_method"] == "fbgemm_fp8":
        return [scaled(".weight_scale", None)]
    # Of scales of a whole tensor or of rows too, where there is no block size.
    return [scaled(".weight_scale_inv", block)]


def _mxfp4_shape(shapes: Mapping[str, Shape]) -> Shape:
    experts, rows, groups, half = shapes["_blocks"]
    if shapes["_scales"] != (experts, rows, groups):
        raise ValueError("scales")
    return experts, groups * half * 2, rows


_MXFP4 = Encoding(("_blocks", "_scales"), (), "", _mxfp4_shape, decoding.mxfp4)
"""gpt-oss: stacks of experts, (experts, out, in) as stored and (experts, in, out) as computed."""


def _integers(quantization: Quantization) -> Encoding:
    """GPTQ's and AWQ's, or AutoRound's in one of the two."""
    parts = (".qweight", ".qzeros", ".scales")
    if quantization.format == "awq":
        awq.check(quantization)

        def of_awq(shapes: Mapping[str, Shape]) -> Shape:
            return shapes[".scales"][1], shapes[".qweight"][0]

        return Encoding(parts, (), ".weight", of_awq, awq.unpack)

    def of_gptq(shapes: Mapping[str, Shape]) -> Shape:
        outputs = shapes[".scales"][1]
        bits = shapes[".qzeros"][1] * 32 // outputs
        return outputs, shapes[".qweight"][0] * 32 // bits

    unpack = partial(gptq.unpack, zero_offset=gptq.zero_offset(quantization))
    return Encoding(parts, (".g_idx",), ".weight", of_gptq, unpack)
