"""The loop of the native quantizers: load a block, quantize it, write it, go on.

Killed, it goes on from the last finished block: the shards lie in a directory that is found again
(``quantkit.convert``), and a file beside them says which blocks are in them. Each block is run
with the weights that were written, so that both ways give the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from quantkit.blocks import DecoderBlocks
from quantkit.calibration import Calibration
from quantkit.checkpoint import Checkpoint
from quantkit.devices import peak_bytes
from quantkit.errors import ConversionError, RecipeError
from quantkit.files import write_json
from quantkit.formats.base import Converted
from quantkit.formats.integer_linears import LinearLayout, entries, linear_weights
from quantkit.formats.shards import Shards
from quantkit.progress import say, track
from quantkit.quantize.rounding import QuantizedBlock
from quantkit.spec import Spec
from quantkit.stopwatch import Stopwatch, stage

QuantizeBlock = Callable[[DecoderBlocks, int, nn.Module, Iterable[torch.Tensor]], QuantizedBlock]
"""Quantizes the linears of one block, given its inputs. It may change what is left of the block,
such as norms into which scales fold."""

_FINISHED = "finished-blocks.json"


def convert_linears(
    checkpoint: Checkpoint,
    spec: Spec,
    calibration: Calibration | None,
    directory: Path,
    quantize: QuantizeBlock,
    layout: LinearLayout,
) -> Converted:
    """Write the shards of a quantized checkpoint into ``directory``; the figures for the manifest.

    Each block sees the output of the blocks already quantized, so that errors are made up for.
    Raise ConversionError, with what is kept, where the disk is full.
    """
    if calibration is None:
        raise RecipeError(f"{spec}: {spec.format} needs calibration text")
    device = calibration.device
    blocks = DecoderBlocks(checkpoint, device, calibration.precision)
    planned = entries(checkpoint, blocks, layout)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with Stopwatch(device) as watch, Shards(directory, planned) as shards:
            finished = _convert(spec, blocks, calibration.ids, directory, quantize, layout, shards)
    except OSError as error:
        raise ConversionError(
            f"{spec}: writing {directory} failed: {error}; the same command goes on from the last "
            "finished block"
        ) from error
    total = sum(entry.bytes for entry in planned)
    linears = linear_weights(blocks)
    packed = {f"{name.removesuffix('.weight')}.{part}" for name in linears for part in layout.parts}
    packed_bytes = sum(entry.bytes for entry in planned if entry.name in packed)
    weights = sum(checkpoint.tensors[name].numel for name in linears)
    return Converted(
        bits_per_weight=total * 8 / checkpoint.parameters,
        bits_per_weight_quantized=packed_bytes * 8 / weights,
        tools={"torch": torch.__version__},
        notes=tuple(note for block in finished for note in block.notes),
        block_errors=tuple(block.output_error for block in finished),
        stage_seconds=watch.seconds,
        peak_device_bytes=peak_bytes(device),
    )


def _convert(
    spec: Spec,
    blocks: DecoderBlocks,
    ids: torch.Tensor,
    directory: Path,
    quantize: QuantizeBlock,
    layout: LinearLayout,
    shards: Shards,
) -> list[_Finished]:
    checkpoint, ledger = blocks.checkpoint, directory / _FINISHED
    for half in directory.glob(f".{_FINISHED}.*"):
        half.unlink()
    finished = _read(ledger, blocks, layout, shards)
    if finished:
        say(f"{spec}: {len(finished)} of {len(blocks)} blocks are in {directory} already")
    with stage("load"):
        hidden = blocks.embed(ids)
    with stage("write"):
        for name in blocks.tensors_outside():
            shards.write(name, checkpoint.read(name))
    for index in track(range(len(blocks)), f"{spec}: blocks"):
        with stage("load"):
            block, prefix = blocks.load(index), blocks.prefix(index)
        if index >= len(finished):
            sample = hidden.batch(0)
            exact = blocks.run(index, block, sample)
            with stage("solve"):
                quantized = quantize(blocks, index, block, hidden)
            for name, integers in quantized.integers.items():
                with stage("pack"):
                    tensors = layout.pack(integers)
                with stage("write"):
                    for part, tensor in tensors.items():
                        shards.write(f"{prefix}{name}.{part}", tensor)
            for name, tensor in _unquantized(block, blocks):
                shards.write(
                    prefix + name, tensor.to(checkpoint.tensors[prefix + name].torch_dtype)
                )
            _restore(block, blocks, index, layout, shards)
            error = _relative(blocks.run(index, block, sample) - exact, exact - sample)
            if not math.isfinite(error):
                raise ConversionError(f"{spec}: {prefix[:-1]} gives values that are not finite")
            digest = _digest(blocks, index, layout, shards)
            finished.append(_Finished(digest, error, quantized.notes))
            write_json(ledger, [asdict(block) for block in finished])
        else:
            _restore(block, blocks, index, layout, shards)
        if index + 1 < len(blocks):
            for number, batch in enumerate(hidden):
                hidden.replace(number, blocks.run(index, block, batch))
    ledger.unlink()
    return finished


@dataclass(frozen=True)
class _Finished:
    """One block in the shards: the hash of its bytes, and what the manifest says of it."""

    sha256: str
    output_error: float
    notes: tuple[str, ...]


def _read(
    ledger: Path, blocks: DecoderBlocks, layout: LinearLayout, shards: Shards
) -> list[_Finished]:
    """The blocks that an interrupted attempt finished, up to the first that is not whole."""
    if not ledger.is_file():
        return []
    found: list[_Finished] = []
    for index, entry in enumerate(json.loads(ledger.read_text(encoding="utf-8"))):
        block = _Finished(entry["sha256"], entry["output_error"], tuple(entry["notes"]))
        if _digest(blocks, index, layout, shards) != block.sha256:
            break
        found.append(block)
    return found


def _digest(blocks: DecoderBlocks, index: int, layout: LinearLayout, shards: Shards) -> str:
    """The hash of all that is written of a block."""
    digest = hashlib.sha256()
    for name in _stored(blocks, index, layout):
        digest.update(shards.read(name).flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stored(blocks: DecoderBlocks, index: int, layout: LinearLayout) -> Iterator[str]:
    """Names of all tensors of a block in the shards."""
    prefix = blocks.prefix(index)
    for name in blocks.state_names:
        linear = name.removesuffix(".weight")
        if linear in blocks.linears:
            yield from (f"{prefix}{linear}.{part}" for part in layout.parts)
        else:
            yield prefix + name


def _unquantized(block: nn.Module, blocks: DecoderBlocks) -> Iterator[tuple[str, torch.Tensor]]:
    """Norms and biases, by their names in the block."""
    for name, tensor in block.state_dict().items():
        if name.removesuffix(".weight") not in blocks.linears:
            yield name, tensor


def _restore(
    block: nn.Module, blocks: DecoderBlocks, index: int, layout: LinearLayout, shards: Shards
) -> None:
    """Give the block the weights that engines will compute with, from what is written."""
    prefix = blocks.prefix(index)
    with stage("pack"):
        for name in blocks.linears:
            parts = [shards.read(f"{prefix}{name}.{part}") for part in layout.parts]
            weight = block.get_parameter(f"{name}.weight")
            on_device = [part.to(blocks.device) for part in parts]
            weight.data = layout.unpack(*on_device).to(weight.dtype)
        for name, tensor in _unquantized(block, blocks):
            tensor.copy_(shards.read(prefix + name))


def _relative(error: torch.Tensor, change: torch.Tensor) -> float:
    """How large an error of a block's output is against what the block adds to its input."""
    return float(error.norm() / change.norm())
