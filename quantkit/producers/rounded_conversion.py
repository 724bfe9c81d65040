"""Variants whose weights depend on no text: each linear rounded by itself, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit.decoder.blocks import DecoderBlocks
from quantkit.errors import ConversionError
from quantkit.formats.integer_linears import LinearLayout
from quantkit.formats.shards import Shards
from quantkit.models.checkpoint import Checkpoint
from quantkit.producers.base import Converted
from quantkit.producers.integer_linears import (
    IntegerLinears,
    Names,
    entries,
    linear_names,
    quantized_bits,
    write_config,
)
from quantkit.producers.linear_options import fused_linears
from quantkit.system.progress import track
from quantkit.system.stopwatch import Stopwatch, stage

RoundTogether = Callable[[Sequence[torch.Tensor]], list[Any]]
"""From the weights of linears that engines run as one to what the layout of each packs."""


def convert_rounded(
    checkpoint: Checkpoint,
    asked: IntegerLinears,
    directory: Path,
    round_together: RoundTogether,
    describe: Callable[[IntegerLinears, Names], dict[str, Any]],
) -> Converted:
    """Write a checkpoint, config.json included; its figures.

    ``describe`` as for ``convert_checkpoint``. Raise ConversionError where the disk is full,
    CheckpointError where a weight is not finite.
    """
    blocks = DecoderBlocks(checkpoint)
    stored = blocks.checkpoint
    layouts = asked.layouts(linear_names(blocks))
    planned = entries(stored, blocks, layouts)
    stored.check_finite()
    try:
        with Stopwatch(torch.device("cpu")) as watch, Shards(directory, planned) as shards:
            for name in blocks.tensors_outside():
                shards.write(name, stored.read(name))
            for index in track(range(len(blocks)), f"{asked.spec}: blocks"):
                for name, tensor in _block(blocks, index, layouts, asked, round_together):
                    with stage("write"):
                        shards.write(name, tensor)
    except OSError as error:
        raise ConversionError(f"{asked.spec}: writing {directory} failed: {error}") from error
    everything, quantized = quantized_bits(stored, planned, layouts)
    write_config(checkpoint, directory, describe(asked, Names.of(blocks)))
    return Converted(
        bits_per_weight=everything,
        bits_per_weight_quantized=quantized,
        tools={"torch": torch.__version__},
        stage_seconds=watch.seconds,
    )


def _block(
    blocks: DecoderBlocks,
    index: int,
    layouts: dict[str, LinearLayout],
    asked: IntegerLinears,
    round_together: RoundTogether,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a block, as they go into the file."""
    stored = blocks.stored(index).values()
    turned = blocks.turned(index)
    linears = [n for name in stored if (n := name.removesuffix(".weight")) in layouts]
    for together in fused_linears(linears, asked.fusion.parts).values():
        with stage("load"):
            weights = [blocks.checkpoint.read(f"{name}.weight") for name in together]
        with stage("solve"):
            rounded = round_together(weights)
        for name, one in zip(together, rounded, strict=True):
            for part, tensor in layouts[name].pack(one).items():
                yield f"{name}.{part}", tensor
    for name in stored:
        if name.removesuffix(".weight") not in layouts:
            tensor = blocks.checkpoint.read(name)
            yield name, tensor.T.contiguous() if name in turned else tensor
