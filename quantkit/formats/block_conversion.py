"""The loop of the native quantizers: load a block, quantize it, write it, go on.

Killed, it goes on from the last finished block: the shards lie in a directory that is found again
(``quantkit.convert``), and a file beside them says which blocks are in them. Each block is run
with the weights that were written, so that both ways give the same bits.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.proof import prove
from quantkit.devices import peak_bytes
from quantkit.errors import ConversionError
from quantkit.files import write_json
from quantkit.formats.base import Converted
from quantkit.formats.block_shards import BlockShards
from quantkit.formats.integer_linears import IntegerLinears, entries, linear_names
from quantkit.formats.shards import Shards
from quantkit.progress import say, track
from quantkit.quantize.rounding import QuantizedBlock
from quantkit.quantize.streamed import StreamedBlock
from quantkit.spec import Spec
from quantkit.stopwatch import Stopwatch, stage

_FINISHED = "finished-blocks.json"


class BlockQuantizer(Protocol):
    """Decides on the integers of one block after another."""

    follows_source: bool
    """Whether it compares with the source's own activations (``StreamedBlock.source``)."""

    def __call__(self, block: StreamedBlock) -> QuantizedBlock:
        """The integers of ``block.linears``. What is left of the block may be changed too, such as
        norms into which scales fold."""
        ...


def convert_linears(
    blocks: DecoderBlocks,
    asked: IntegerLinears,
    ids: torch.Tensor,
    directory: Path,
    quantize: BlockQuantizer,
) -> Converted:
    """Write the shards of a quantized checkpoint into ``directory``; the figures for the manifest.

    ``ids``: the calibration windows, (samples, T). Each block sees the output of the blocks already
    quantized, so that errors are made up for. Raise ConversionError, with what is kept, where
    the disk is full or the blocks are not transformers' model, CheckpointError where a weight is
    not finite, in the blocks or outside.
    """
    spec = asked.spec
    checkpoint, device = blocks.checkpoint, blocks.device
    layouts = asked.layouts(linear_names(blocks))
    planned = entries(checkpoint, blocks, layouts)
    checkpoint.check_finite()
    prove(checkpoint)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with Stopwatch(device) as watch, Shards(directory, planned) as shards:
            written = BlockShards(blocks, layouts, shards)
            finished = _convert(asked, written, ids, directory, quantize)
    except OSError as error:
        raise ConversionError(
            f"{spec}: writing {directory} failed: {error}; the same command goes on from the last "
            "finished block"
        ) from error
    total = sum(entry.bytes for entry in planned)
    packed = {f"{name}.{part}" for name, layout in layouts.items() for part in layout.parts}
    packed_bytes = sum(entry.bytes for entry in planned if entry.name in packed)
    weights = sum(checkpoint.tensors[f"{name}.weight"].numel for name in layouts)
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
    asked: IntegerLinears,
    written: BlockShards,
    ids: torch.Tensor,
    directory: Path,
    quantize: BlockQuantizer,
) -> list[_Finished]:
    spec, blocks, shards = asked.spec, written.blocks, written.shards
    ledger = directory / _FINISHED
    for half in directory.glob(f".{_FINISHED}.*"):
        half.unlink()
    finished = _read(ledger, written)
    if finished:
        say(f"{spec}: {len(finished)} of {len(blocks)} blocks are in {directory} already")
    with stage("load"):
        inputs = blocks.embed(ids)
        source = blocks.embed(ids) if quantize.follows_source else None
    with stage("write"):
        for name in blocks.tensors_outside():
            shards.write(name, blocks.checkpoint.read(name))
    for index in track(range(len(blocks)), f"{spec}: blocks"):
        with stage("load"):
            module = blocks.load(index)
        block = StreamedBlock(blocks, index, module, written.linears(index), inputs, source)
        if index >= len(finished):
            finished.append(_quantize(spec, block, written, quantize))
            write_json(ledger, [asdict(entry) for entry in finished])
        else:
            if source is not None:
                block.advance_source(module)
            written.restore(index, module)
        if index + 1 < len(blocks):
            blocks.advance(index, module, inputs)
    ledger.unlink()
    return finished


def _quantize(
    spec: Spec, block: StreamedBlock, written: BlockShards, quantize: BlockQuantizer
) -> _Finished:
    """Quantize a block and write it; its module then computes with what was written."""
    blocks, index, module = block.blocks, block.index, block.module
    sample = block.inputs.batch(0)
    exact = blocks.run(index, module, sample)
    if not torch.isfinite(exact).all():
        raise ConversionError(
            f"{spec}: {block.name} gives values that are not finite before it is quantized; see "
            "whether the source is whole"
        )
    with stage("solve"):
        quantized = quantize(block)
    written.write(index, module, quantized.integers)
    written.restore(index, module)
    error = _relative(blocks.run(index, module, sample) - exact, exact - sample)
    if not math.isfinite(error):
        raise ConversionError(f"{spec}: {block.name} gives values that are not finite")
    return _Finished(written.digest(index), error, quantized.notes)


@dataclass(frozen=True)
class _Finished:
    """One block in the shards: the hash of its bytes, and what the manifest says of it."""

    sha256: str
    output_error: float
    notes: tuple[str, ...]


def _read(ledger: Path, written: BlockShards) -> list[_Finished]:
    """The blocks that an interrupted attempt finished, up to the first that is not whole."""
    if not ledger.is_file():
        return []
    found: list[_Finished] = []
    for index, entry in enumerate(json.loads(ledger.read_text(encoding="utf-8"))):
        block = _Finished(entry["sha256"], entry["output_error"], tuple(entry["notes"]))
        if written.digest(index) != block.sha256:
            break
        found.append(block)
    return found


def _relative(error: torch.Tensor, change: torch.Tensor) -> float:
    """How large an error of a block's output is against what the block adds to its input."""
    return float(error.norm() / change.norm())
