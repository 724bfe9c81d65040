"""The loop of the native quantizers: load a block, quantize it, write it, go on.

Killed, it continues from the last finished block: ``convert`` finds the directory with the shards
again, and a file beside them says which blocks are in them. Each block is run with the weights
that were written, so that both ways give the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel
from torch import nn

from quantkit.data.calibration import Calibration
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.expert_names import every_expert
from quantkit.decoder.proof import prove
from quantkit.decoder.structure import Structure
from quantkit.errors import ConversionError
from quantkit.formats.integer_linears import Floats, Integers
from quantkit.formats.shards import Shards
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import (
    BlockRecord,
    DeviationRecord,
    FoldRecord,
    LossRecord,
    StructureRecord,
)
from quantkit.producers.base import Converted
from quantkit.producers.block_shards import BlockShards
from quantkit.producers.integer_linears import (
    IntegerLinears,
    Names,
    entries,
    linear_names,
    needed,
    quantized_bits,
    write_config,
)
from quantkit.quantize.deviation import Deviation, deviation
from quantkit.quantize.held_out import HeldOut, Loss
from quantkit.quantize.rounding import QuantizedBlock
from quantkit.quantize.streamed import StreamedBlock
from quantkit.system.devices import peak_bytes
from quantkit.system.files import write_json
from quantkit.system.progress import say, track
from quantkit.system.stopwatch import Stopwatch, stage

_FINISHED = "finished-blocks.json"


class BlockQuantizer(Protocol):
    """Decides on the integers of one block after another."""

    def __call__(self, block: StreamedBlock) -> QuantizedBlock:
        """The integers of ``block.linears``. What is left of the block may be changed too, such as
        norms into which scales fold."""
        ...

    def rounded(self, block: StreamedBlock, module: nn.Module) -> Mapping[str, Integers | Floats]:
        """The same linears of ``module``, as the source has it, rounded to nearest."""
        ...


def convert_checkpoint(
    checkpoint: Checkpoint,
    asked: IntegerLinears,
    calibration: Calibration | None,
    directory: Path,
    quantize: BlockQuantizer,
    describe: Callable[[IntegerLinears, Names], dict[str, Any]],
) -> tuple[Converted, dict[str, Any]]:
    """Write a quantized checkpoint, config.json included; its figures, and its quantization_config.

    ``describe`` gives that. Raise as ``convert_linears``, and RecipeError where there is no
    calibration.
    """
    windows = needed(asked.spec, calibration)
    blocks = DecoderBlocks(checkpoint, windows.device, windows.precision)
    converted = convert_linears(blocks, asked, windows, directory, quantize)
    config = describe(asked, Names.of(blocks))
    write_config(checkpoint, directory, config)
    return converted, config


def convert_linears(
    blocks: DecoderBlocks,
    asked: IntegerLinears,
    windows: Calibration,
    directory: Path,
    quantize: BlockQuantizer,
) -> Converted:
    """Write the shards of a quantized checkpoint into ``directory``; the figures for the manifest.

    Each block sees the output of the blocks already
    quantized, so that errors are made up for. Raise ConversionError, with what is kept, where
    the disk is full or the blocks are not transformers' model, CheckpointError where a weight is
    not finite, in the blocks or outside.
    """
    spec = asked.spec
    checkpoint, device = blocks.checkpoint, blocks.device
    layouts = asked.layouts(linear_names(blocks))
    planned = entries(checkpoint, blocks, layouts)
    checkpoint.check_finite()
    prove(blocks.source)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with Stopwatch(device) as watch, Shards(directory, planned) as shards:
            written = BlockShards(blocks, layouts, shards)
            finished, losses = _convert(asked, written, windows, directory, quantize)
    except OSError as error:
        raise ConversionError(
            f"{spec}: writing {directory} failed: {error}; run the same command again to "
            "continue from the last finished block"
        ) from error
    everything, quantized = quantized_bits(checkpoint, planned, layouts)
    return Converted(
        bits_per_weight=everything,
        bits_per_weight_quantized=quantized,
        tools={"torch": torch.__version__},
        notes=(
            *(note for block in finished for note in block.notes),
            *(note for kind, loss in losses.items() for note in _not_generalized(kind, loss)),
        ),
        blocks=tuple(block.record for block in finished),
        structure=tuple(_recorded(blocks)),
        held_out={kind: LossRecord(**asdict(loss)) for kind, loss in losses.items()},
        stage_seconds=watch.seconds,
        peak_device_bytes=peak_bytes(device),
    )


def _recorded(blocks: DecoderBlocks) -> Iterator[StructureRecord]:
    """Each structure that blocks have, and which."""
    kinds: dict[int, tuple[Structure, list[int]]] = {}
    for index in range(len(blocks)):
        structure = blocks.structure(index)
        kinds.setdefault(id(structure), (structure, []))[1].append(index)

    def said(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(map(every_expert, names)))

    for structure, numbers in kinds.values():
        folds = dict.fromkeys(
            (every_expert(fold.smooth_layer), said(fold.balance_layers), fold.offset)
            for fold in structure.folds
        )
        yield StructureRecord(
            blocks=numbers,
            inputs=[list(names) for names in dict.fromkeys(map(said, structure.inputs))],
            writers=list(said(structure.writers)),
            folds=[
                FoldRecord(smooth_layer=smooth, balance_layers=list(balance), offset=offset)
                for smooth, balance, offset in folds
            ],
            unfolded={every_expert(n): every_expert(w) for n, w in structure.unfolded.items()},
        )


def _not_generalized(kind: str, loss: Loss) -> Iterator[str]:
    if loss.kld >= loss.rounding_kld:
        yield (
            f"on text that it was not calibrated on ({kind}) it is no nearer to the source than "
            f"rounding to nearest (KLD {loss.kld:.4f} against {loss.rounding_kld:.4f} nats); "
            "calibrate on the mix, or on more text of this kind"
        )


def _convert(
    asked: IntegerLinears,
    written: BlockShards,
    windows: Calibration,
    directory: Path,
    quantize: BlockQuantizer,
) -> tuple[list[_Finished], dict[str, Loss]]:
    spec, blocks, shards = asked.spec, written.blocks, written.shards
    ledger = directory / _FINISHED
    for half in directory.glob(f".{_FINISHED}.*"):
        half.unlink()
    finished = _read(ledger, written)
    if finished:
        say(f"{spec}: {len(finished)} of {len(blocks)} blocks are in {directory} already")
    with stage("load"):
        inputs = blocks.embed(windows.ids)
        source = inputs.copy()
        held_out = HeldOut(blocks, windows.held_out)
    with stage("write"):
        for name in blocks.tensors_outside():
            shards.write(name, blocks.checkpoint.read(name))
    for index in track(range(len(blocks)), f"{spec}: blocks"):
        with stage("load"):
            module = blocks.load(index)
        block = StreamedBlock(blocks, index, module, written.linears(index), inputs, source)
        if index >= len(finished):
            finished.append(_quantize(spec, block, written, quantize, held_out))
            write_json(ledger, [entry.model_dump() for entry in finished])
        else:
            block.advance_source(module)
            written.restore(index, module)
            _advance_held_out(block, quantize, held_out)
        if index + 1 < len(blocks):
            blocks.advance(index, module, inputs)
    ledger.unlink()
    return finished, held_out.losses() if held_out else {}


def _quantize(
    spec: Spec,
    block: StreamedBlock,
    written: BlockShards,
    quantize: BlockQuantizer,
    held_out: HeldOut,
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
    found = deviation(blocks.run(index, module, sample), exact, sample)
    if not math.isfinite(found.error):
        raise ConversionError(f"{spec}: {block.name} gives values that are not finite")
    held = _advance_held_out(block, quantize, held_out)
    record = BlockRecord(
        calibration=DeviationRecord(**asdict(found)),
        held_out={kind: DeviationRecord(**asdict(one)) for kind, one in held.items()},
    )
    return _Finished(sha256=written.digest(index), record=record, notes=quantized.notes)


def _advance_held_out(
    block: StreamedBlock, quantize: BlockQuantizer, held_out: HeldOut
) -> dict[str, Deviation]:
    """Send held-out text through a block that computes with what was written."""
    if not held_out:
        return {}
    source_block = block.blocks.load(block.index)
    return held_out.advance(
        block.index, source_block, quantize.rounded(block, source_block), block.module
    )


class _Finished(BaseModel):
    """One block in the shards: the hash of its bytes, and what the manifest says of it."""

    sha256: str
    record: BlockRecord
    notes: tuple[str, ...]


def _read(ledger: Path, written: BlockShards) -> list[_Finished]:
    """The blocks that an interrupted attempt finished, up to the first that is not whole."""
    if not ledger.is_file():
        return []
    found: list[_Finished] = []
    for index, entry in enumerate(json.loads(ledger.read_text(encoding="utf-8"))):
        block = _Finished.model_validate(entry)
        if written.digest(index) != block.sha256:
            break
        found.append(block)
    return found
