"""Variants whose weights depend on no text: each linear rounded by itself, one after another.

Where the file has a scale of each linear's whole input, calibration text then runs through the
blocks, with the weights that were written, and the largest magnitudes decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.data.calibration import Calibration
from quantkit.decoder.activations import Activations
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.proof import prove
from quantkit.errors import ConversionError
from quantkit.formats.integer_linears import LinearLayout
from quantkit.formats.shards import Shards
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import GroupScheme
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
from quantkit.quantize.input_scales import input_scales
from quantkit.system.progress import track
from quantkit.system.stopwatch import Stopwatch, stage

RoundTogether = Callable[[Sequence[torch.Tensor], GroupScheme], list[Any]]
"""From the weights of linears that engines run as one, and their scheme, to what the layout of each
packs."""


Tensors = dict[str, torch.Tensor]
"""Those of one linear, by the ends of their names."""


def convert_rounded(
    checkpoint: Checkpoint,
    asked: IntegerLinears,
    directory: Path,
    round_together: RoundTogether,
    describe: Callable[[IntegerLinears, Names], dict[str, Any]],
    calibration: Calibration | None = None,
) -> Converted:
    """Write a checkpoint, config.json included; its figures.

    ``describe`` as for ``convert_checkpoint``; ``calibration``: where inputs have stored scales.
    Raise ConversionError where the disk is full, or as ``input_scales``, CheckpointError where a
    weight is not finite.
    """
    how = (calibration.device, calibration.precision) if calibration else ()
    blocks = DecoderBlocks(checkpoint, *how)
    stored = blocks.checkpoint
    layouts = asked.layouts(linear_names(blocks))
    planned = entries(stored, blocks, layouts)
    stored.check_finite()
    if calibration:
        prove(blocks.source)
    try:
        with Stopwatch(blocks.device) as watch, Shards(directory, planned) as shards:
            with stage("load"):
                inputs = blocks.embed(calibration.ids) if calibration else None
            for name in blocks.tensors_outside():
                shards.write(name, stored.read(name))
            for index in track(range(len(blocks)), f"{asked.spec}: blocks"):
                linears = _rounded(blocks, index, layouts, asked, round_together)
                if inputs:
                    _add_input_scales(blocks, index, layouts, linears, inputs)
                with stage("write"):
                    _write(blocks, index, linears, shards)
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


def _rounded(
    blocks: DecoderBlocks,
    index: int,
    layouts: Mapping[str, LinearLayout],
    asked: IntegerLinears,
    round_together: RoundTogether,
) -> dict[str, Tensors]:
    """The quantized linears of a block by their names in the file."""
    names = [linear for linear in blocks.linears(index).values() if linear in layouts]
    found: dict[str, Tensors] = {}
    for together in fused_linears(names, asked.fusion.parts).values():
        with stage("load"):
            weights = [blocks.checkpoint.read(f"{name}.weight") for name in together]
        with stage("solve"):
            rounded = round_together(weights, layouts[together[0]].scheme)
        for name, one in zip(together, rounded, strict=True):
            found[name] = layouts[name].pack(one)
    return found


def _add_input_scales(
    blocks: DecoderBlocks,
    index: int,
    layouts: Mapping[str, LinearLayout],
    linears: Mapping[str, Tensors],
    inputs: Activations,
) -> None:
    """Send ``inputs`` through a block that computes with these linears, which then have the scales
    of their inputs."""
    with stage("load"):
        module = blocks.load(index)
    written = {name: stored for name, stored in blocks.linears(index).items() if stored in linears}
    for name, stored in written.items():
        weight = module.get_parameter(f"{name}.weight")
        weight.data = layouts[stored].unpack(*linears[stored].values()).to(weight)
    scaled = {n: at for n, at in written.items() if "input_global_scale" in layouts[at].parts}
    alike = [[n for n in names if n in scaled] for names in blocks.structure(index).inputs]
    found = input_scales(
        module,
        [names for names in alike if names],
        partial(blocks.advance, index, module, inputs),
        blocks.prefix(index).removesuffix("."),
    )
    for name, stored in scaled.items():
        linears[stored]["input_global_scale"] = found[name]


def _write(
    blocks: DecoderBlocks, index: int, linears: Mapping[str, Tensors], shards: Shards
) -> None:
    """A block, its linears as they are given, all else as the source has it."""
    turned = blocks.turned(index)
    for name in blocks.stored(index).values():
        linear = name.removesuffix(".weight")
        if linear in linears:
            for part, tensor in linears[linear].items():
                shards.write(f"{linear}.{part}", tensor)
        else:
            tensor = blocks.checkpoint.read(name)
            shards.write(name, tensor.T.contiguous() if name in turned else tensor)
