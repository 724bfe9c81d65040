"""What GPTQ and AWQ have in common: integer linears in a safetensors checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.errors import (
    CheckpointError,
    ConversionError,
    IncompatibleVariant,
    RecipeError,
)
from quantkit.formats.base import Converted, Plan
from quantkit.spec import GroupScheme, Spec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quantkit.blocks import DecoderBlocks
    from quantkit.calibration import Calibration
    from quantkit.quantize.rounding import Integers

_STORED_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def plan_linears(
    checkpoint: Checkpoint,
    spec: Spec,
    scheme: GroupScheme,
    linear_bytes: Callable[[int, int], int],
) -> Plan:
    """Check every linear against the scheme and sum the bytes; reads no tensor data.

    ``linear_bytes(in_features, out_features)`` says what one quantized linear takes.
    Raise ConversionError naming the first linear whose shape does not fit.
    """
    from quantkit.blocks import DecoderBlocks

    blocks = DecoderBlocks(checkpoint)
    quantized = linear_weights(blocks)
    for name in quantized:
        out_features, in_features = checkpoint.tensors[name].shape
        check_shape(spec, scheme, name.removesuffix(".weight"), in_features, out_features)
    total = 0
    for name, info in checkpoint.tensors.items():
        if name in quantized:
            out_features, in_features = info.shape
            total += linear_bytes(in_features, out_features)
        else:
            total += info.numel * _STORED_BYTES[info.dtype]
    return Plan(spec, total, total * 8 / checkpoint.parameters, needs_calibration=True)


def linear_weights(blocks: DecoderBlocks) -> dict[str, None]:
    """Names of the weights that are quantized, in order: every linear of every block."""
    return {
        f"{blocks.prefix(index)}{linear}.weight": None
        for index in range(len(blocks))
        for linear in blocks.linears
    }


def check_shape(
    spec: Spec, scheme: GroupScheme, where: str, in_features: int, out_features: int
) -> None:
    """Raise ConversionError where the linear's sizes do not fit the scheme's groups and words."""
    size = scheme.group_size
    if size != -1 and in_features % size:
        fitting = [str(g) for g in (32, 64, 128) if in_features % g == 0]
        hint = f"use {' or '.join(fitting)}" if fitting else "no group size fits: use gguf"
        raise ConversionError(
            f"{spec}: group_size {size} does not divide in_features {in_features} ({where}); {hint}"
        )
    per_word = 32 // scheme.bits
    for axis, count in (("in_features", in_features), ("out_features", out_features)):
        if count % per_word:
            raise ConversionError(
                f"{spec}: {axis} {count} does not divide by {per_word} ({where}); use gguf"
            )


QuantizeBlock = Callable[
    ["DecoderBlocks", int, "nn.Module", Iterable["torch.Tensor"]], dict[str, "Integers"]
]
"""Quantizes the linears of one block, given its inputs; by name. It may change what is left of the
block, such as norms into which scales fold."""


def convert_linears(
    checkpoint: Checkpoint,
    spec: Spec,
    calibration: Calibration | None,
    directory: Path,
    quantize: QuantizeBlock,
    pack: Callable[[Integers], dict[str, torch.Tensor]],
) -> Converted:
    """The one loop of the native quantizers: load a block, quantize it, write it, go on.

    Each block sees the output of the blocks already quantized, so that errors are made up for.
    ``pack`` gives the tensors that stand for one linear. Returns the figures for the manifest.
    """
    import torch

    from quantkit.blocks import DecoderBlocks
    from quantkit.devices import peak_bytes
    from quantkit.formats.shards import ShardWriter
    from quantkit.progress import track
    from quantkit.stopwatch import Stopwatch, stage

    if calibration is None:
        raise RecipeError(f"{spec}: {spec.format} needs calibration text")
    device = calibration.device
    blocks = DecoderBlocks(checkpoint, device, calibration.precision)
    writer = ShardWriter(directory)
    packed_bytes = packed_weights = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with Stopwatch(device) as watch:
        with stage("load"):
            hidden = blocks.embed(calibration.ids)
        with stage("write"):
            for name in blocks.tensors_outside():
                writer.add(name, checkpoint.read(name))
        for index in track(range(len(blocks)), f"{spec}: blocks"):
            with stage("load"):
                block, prefix = blocks.load(index), blocks.prefix(index)
            with stage("solve"):
                integers = quantize(blocks, index, block, hidden)
            for name, linear in integers.items():
                with stage("pack"):
                    weight = block.get_parameter(f"{name}.weight")
                    weight.data = linear.dequantize().to(weight.dtype)
                    tensors = pack(linear)
                packed_weights += linear.codes.numel()
                packed_bytes += sum(tensor.nbytes for tensor in tensors.values())
                with stage("write"):
                    for part, tensor in tensors.items():
                        writer.add(f"{prefix}{name}.{part}", tensor)
            with stage("write"):
                for name, tensor in block.state_dict().items():
                    if name.removesuffix(".weight") not in integers:
                        stored = checkpoint.tensors[prefix + name].torch_dtype
                        writer.add(prefix + name, tensor.to(stored))
            del integers
            for number, batch in enumerate(hidden):
                hidden.replace(number, blocks.run(index, block, batch))
        with stage("write"):
            writer.close()
    return Converted(
        bits_per_weight=writer.tensor_bytes * 8 / checkpoint.parameters,
        bits_per_weight_quantized=packed_bytes * 8 / packed_weights,
        tools={"torch": torch.__version__},
        stage_seconds=watch.seconds,
        peak_device_bytes=peak_bytes(device),
    )


def write_config(checkpoint: Checkpoint, directory: Path, quantization: dict[str, Any]) -> None:
    """The source's config.json with ``quantization_config`` added, nothing else changed."""
    config = {**checkpoint.config, "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_quantization(directory: Path, supported: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """``quantization_config``; raise IncompatibleVariant for a value that cannot be unpacked."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    quantization: dict[str, Any] = config["quantization_config"]
    for key, values in supported.items():
        if quantization.get(key, values[0]) not in values:
            raise IncompatibleVariant(
                f"{directory}: {key} is {quantization[key]!r}; quantkit unpacks "
                f"{', '.join(map(repr, values))}"
            )
    return quantization


def unpack_linears(
    directory: Path, parts: tuple[str, ...], unpack: Callable[..., torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain state dict of a packed checkpoint, tensor by tensor.

    A linear is stored as ``NAME.part`` for each of ``parts``; ``unpack(*tensors)`` gives its
    (out, in) float32 weight, yielded as ``NAME.weight``. Everything else is yielded as it is.
    """
    packed = Checkpoint.open(directory)
    suffix = f".{parts[0]}"
    for name in packed.tensors:
        stem, _, part = name.rpartition(".")
        if name.endswith(suffix):
            missing = [p for p in parts if f"{stem}.{p}" not in packed.tensors]
            if missing:
                raise CheckpointError(f"{directory}: {stem} has no {', '.join(missing)}")
            yield f"{stem}.weight", unpack(*(packed.read(f"{stem}.{p}") for p in parts))
        elif part not in parts:
            yield name, packed.read(name)


def packed_facts(directory: Path) -> dict[str, Any]:
    """What `inspect` says of a GPTQ or AWQ checkpoint."""
    packed = Checkpoint.open(directory)
    return {
        "architecture": packed.architecture,
        "context_length": packed.config.get("max_position_embeddings"),
        "tensors": len(packed.tensors),
        "quantized_linears": sum(name.endswith(".qweight") for name in packed.tensors),
        "bytes": sum(_tensor_bytes(info.dtype, info.shape) for info in packed.tensors.values()),
        "quantization_config": packed.config["quantization_config"],
    }


def _tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * (_STORED_BYTES | {"I32": 4})[dtype]
