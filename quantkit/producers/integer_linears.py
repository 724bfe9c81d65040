"""What GPTQ and AWQ have in common: integer linears in a safetensors checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.engines.vllm import architectures
from quantkit.engines.vllm.architectures import Fusion
from quantkit.errors import ConversionError, RecipeError
from quantkit.formats.integer_linears import LinearLayout
from quantkit.formats.packed import refuse_packed
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import GroupScheme, Spec
from quantkit.models.stored_names import roots
from quantkit.producers.base import Plan
from quantkit.producers.linear_options import LinearOptions, fused_linears

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration
    from quantkit.decoder.blocks import DecoderBlocks
    from quantkit.formats.shards import Entry

_KERNEL_COLUMNS = 32
"""Output channels that engines' kernels take at a time."""
_SMALLEST_GROUP = 32


@dataclass(frozen=True)
class IntegerLinears:
    """All that a spec asks for: the scheme, options, and the layout of a linear of any scheme."""

    spec: Spec
    scheme: GroupScheme
    options: LinearOptions
    layout: Callable[[GroupScheme], LinearLayout]
    fusion: Fusion
    """Which linears engines run as one."""
    scaled: bool = False
    """Whether channels are scaled before rounding, and back in what precedes them."""

    def schemes(self, linears: Sequence[str]) -> dict[str, GroupScheme]:
        """Those of ``linears``, names in the checkpoint, that are quantized, and how."""
        return self.options.schemes(self.spec, self.scheme, linears, self.fusion.parts)

    def layouts(self, linears: Sequence[str]) -> dict[str, LinearLayout]:
        """How each of these lies in a file."""
        schemes = self.schemes(linears)
        made = {scheme: self.layout(scheme) for scheme in schemes.values()}
        return {name: made[scheme] for name, scheme in schemes.items()}


def plan_linears(checkpoint: Checkpoint, asked: IntegerLinears) -> Plan:
    """Check every linear against its scheme and sum the bytes; reads no tensor data.

    Raise ConversionError naming the first linear whose shape does not fit.
    """
    from quantkit.decoder.blocks import DecoderBlocks

    spec = asked.spec
    refuse_packed(spec, checkpoint)
    blocks = DecoderBlocks(checkpoint)
    checkpoint = blocks.checkpoint
    linears = linear_names(blocks)
    if not linears:
        raise ConversionError(
            f"{spec}: the blocks of {checkpoint.id} ({checkpoint.architecture}) have no linears "
            "that quantkit can quantize; use gguf"
        )
    layouts = asked.layouts(linears)
    for name, layout in layouts.items():
        out_features, in_features = checkpoint.tensors[f"{name}.weight"].shape
        check_shape(spec, layout.scheme, name, in_features, out_features)
        check_blocks(spec, layout.block, name, in_features, out_features)
    total = sum(entry.bytes for entry in entries(checkpoint, blocks, layouts))
    misread = _misread(blocks)
    narrow = [
        name
        for name in _all_linears(blocks)
        if not _fits_kernels(*checkpoint.tensors[f"{name}.weight"].shape)
    ]
    listed = {
        "linears are not quantized, as no kernel takes their widths": narrow,
        "linears are not quantized, as engines run them as one with such": [
            name for name in _all_linears(blocks) if name not in {*linears, *narrow, *misread}
        ],
        "linears are not quantized, as vLLM would compute wrongly from them": misread,
        "linears are not quantized": [name for name in linears if name not in layouts],
        "tensors are left out, as by transformers": blocks.ignored,
        "tensors are not text and are copied as they are": blocks.beside,
        **_unproved(blocks, layouts, scaled=asked.scaled),
    }
    notes = [
        f"{len(names)} {what}: {', '.join(names[:3])}{' …' * (len(names) > 3)}"
        for what, names in listed.items()
        if names
    ]
    notes += architectures.known_of(checkpoint.architecture, spec.format)
    return Plan(
        spec,
        total,
        total * 8 / checkpoint.parameters,
        needs_calibration=True,
        notes=tuple(notes),
        options=asked.options.resolved(),
    )


def _unproved(
    blocks: DecoderBlocks, layouts: Collection[str], *, scaled: bool
) -> dict[str, list[str]]:
    """What is quantized without a step that its block was not proved to allow: why → names."""
    found: dict[str, list[str]] = {}
    for index in range(len(blocks)):
        structure, stored = blocks.structure(index), blocks.linears(index)
        for name, why in structure.unfolded.items() if scaled else ():
            if stored[name] in layouts:
                found.setdefault(f"linears are not scaled ({why})", []).append(stored[name])
        if not structure.writers:
            found.setdefault(
                "blocks have no linear whose output is added unchanged to the residual stream, so "
                "none corrects the stream's error",
                [],
            ).append(blocks.prefix(index).removesuffix("."))
    return found


def entries(
    checkpoint: Checkpoint, blocks: DecoderBlocks, layouts: Mapping[str, LinearLayout]
) -> list[Entry]:
    """All tensors of the quantized checkpoint, those outside of the blocks first."""
    from quantkit.formats.shards import Entry

    def stored(name: str) -> Entry:
        return Entry(name, checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)

    found = [stored(name) for name in blocks.tensors_outside()]
    for index in range(len(blocks)):
        for full in blocks.stored(index).values():
            linear = full.removesuffix(".weight")
            if not full.endswith(".weight") or linear not in layouts:
                entry = stored(full)
                turned = full in blocks.turned(index)
                found.append(replace(entry, shape=entry.shape[::-1]) if turned else entry)
                continue
            out_features, in_features = checkpoint.tensors[full].shape
            shapes = layouts[linear].shapes(in_features, out_features)
            found += [Entry(f"{linear}.{part}", *described) for part, described in shapes.items()]
    return found


def quantized_bits(
    checkpoint: Checkpoint, planned: Sequence[Entry], layouts: Mapping[str, LinearLayout]
) -> tuple[float, float]:
    """Bits per weight of all tensors that are ``planned``, and of the quantized linears alone."""
    total = sum(entry.bytes for entry in planned)
    packed = {f"{name}.{part}" for name, layout in layouts.items() for part in layout.parts}
    packed_bytes = sum(entry.bytes for entry in planned if entry.name in packed)
    weights = sum(checkpoint.tensors[f"{name}.weight"].numel for name in layouts)
    return total * 8 / checkpoint.parameters, packed_bytes * 8 / weights


def linear_names(blocks: DecoderBlocks) -> list[str]:
    """Names in the checkpoint of every linear of every block, in order, but for those that vLLM
    misreads, those of widths that no kernel takes, a gate of one channel, and for what engines run
    as one with them."""
    tensors = blocks.checkpoint.tensors
    names = _all_linears(blocks)
    fusion = Fusion.of(blocks.checkpoint.architecture)
    left = {
        name
        for made_of in fused_linears(names, fusion.parts).values()
        if not all(_fits_kernels(*tensors[f"{part}.weight"].shape) for part in made_of)
        for name in made_of
    }
    left |= set(_misread(blocks))
    return [name for name in names if name not in left]


def _misread(blocks: DecoderBlocks) -> list[str]:
    parts = architectures.misread(blocks.checkpoint.architecture)
    return [name for name in _all_linears(blocks) if name.rpartition(".")[2] in parts]


def _all_linears(blocks: DecoderBlocks) -> list[str]:
    return [name for index in range(len(blocks)) for name in blocks.linears(index).values()]


def _fits_kernels(out_features: int, in_features: int) -> bool:
    return out_features % _KERNEL_COLUMNS == 0 and in_features % _SMALLEST_GROUP == 0


@dataclass(frozen=True)
class Names:
    """The names of a checkpoint's modules, as an engine has to be told of them.

    ``linears``: all of blocks that can be quantized. ``routers``: other matrices of blocks, such as
    what gives tokens to experts, and linears that fit no kernel. ``outside``: matrices of no block.
    ``beside``: the parts that are not text, ``vision_tower``. To an engine all but the first may be
    linears too, which are not quantized.
    """

    linears: Sequence[str]
    routers: Sequence[str]
    outside: Sequence[str]
    beside: Sequence[str]

    @classmethod
    def of(cls, blocks: DecoderBlocks) -> Names:
        """Of a checkpoint."""
        tensors = blocks.checkpoint.tensors
        linears = linear_names(blocks)
        quantized = set(linears)

        def matrices(stored: Iterable[str]) -> list[str]:
            names = [name for name in stored if len(tensors[name].shape) == 2]
            ends = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
            return [name for name in ends if name not in quantized]

        inside = [name for index in range(len(blocks)) for name in blocks.stored(index).values()]
        outside = [name for name in blocks.tensors_outside() if name not in set(blocks.beside)]
        return cls(
            linears, matrices(inside), matrices(outside), roots(blocks.beside, blocks.prefix(0))
        )


def check_shape(
    spec: Spec, scheme: GroupScheme, where: str, in_features: int, out_features: int
) -> None:
    """Raise ConversionError where the linear's sizes fit no groups, words or kernels."""
    size = scheme.group_size
    if size != -1 and in_features % size:
        fitting = [str(g) for g in (32, 64, 128) if in_features % g == 0]
        hint = f"use {' or '.join(fitting)}" if fitting else "no group size fits: use gguf"
        raise ConversionError(
            f"{spec}: group_size {size} does not divide in_features {in_features} ({where}); {hint}"
        )
    for axis, count, unit in (
        ("in_features", in_features, 32 // scheme.bits),
        ("out_features", out_features, _KERNEL_COLUMNS),
    ):
        if count % unit:
            raise ConversionError(
                f"{spec}: {axis} {count} does not divide by {unit} ({where}); use gguf"
            )


def check_blocks(
    spec: Spec, block: tuple[int, int] | None, where: str, in_features: int, out_features: int
) -> None:
    """Raise ConversionError where blocks of (rows, columns) do not cover the linear exactly."""
    if block and (out_features % block[0] or in_features % block[1]):
        raise ConversionError(
            f"{spec}: blocks of {block[0]} x {block[1]} do not divide {out_features} x "
            f"{in_features} ({where}); use compressed-tensors:FP8_DYNAMIC"
        )


def needed(spec: Spec, calibration: Calibration | None) -> Calibration:
    """The calibration; raise RecipeError where there is none."""
    if calibration is None:
        raise RecipeError(f"{spec}: {spec.format} needs calibration text")
    return calibration


def write_config(checkpoint: Checkpoint, directory: Path, quantization: dict[str, Any]) -> None:
    """The source's config.json with ``quantization_config`` added, nothing else changed."""
    config = {**checkpoint.config, "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
