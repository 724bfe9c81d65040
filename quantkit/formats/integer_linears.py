"""What GPTQ and AWQ have in common: integer linears in a safetensors checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.errors import ConversionError
from quantkit.formats.base import Plan
from quantkit.spec import GroupScheme, Spec

if TYPE_CHECKING:
    import torch

    from quantkit.blocks import DecoderBlocks
    from quantkit.formats.shards import Entry
    from quantkit.quantize.rounding import Integers

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""What the native quantizers make, and vLLM was seen to load."""


@dataclass(frozen=True)
class LinearLayout:
    """How one linear lies in a file, as several tensors (DESIGN, section 4).

    ``shapes(in, out)``: dtype and shape of each, by the end of its name (``qweight``).
    ``pack(integers)`` gives them, ``unpack(*tensors)`` the (out, in) float32 weight again.
    """

    shapes: Callable[[int, int], dict[str, tuple[str, tuple[int, ...]]]]
    pack: Callable[[Integers], dict[str, torch.Tensor]]
    unpack: Callable[..., torch.Tensor]

    @property
    def parts(self) -> tuple[str, ...]:
        """The ends of their names."""
        return tuple(self.shapes(128, 128))


def plan_linears(
    checkpoint: Checkpoint, spec: Spec, scheme: GroupScheme, layout: LinearLayout
) -> Plan:
    """Check every linear against the scheme and sum the bytes; reads no tensor data.

    Raise ConversionError naming the first linear whose shape does not fit.
    """
    from quantkit.blocks import DecoderBlocks

    if checkpoint.architecture not in ARCHITECTURES:
        raise ConversionError(
            f"{spec}: {checkpoint.id} is a {checkpoint.architecture}; the native quantizers know "
            f"{', '.join(ARCHITECTURES)}; use gguf"
        )
    blocks = DecoderBlocks(checkpoint)
    for name in linear_weights(blocks):
        out_features, in_features = checkpoint.tensors[name].shape
        check_shape(spec, scheme, name.removesuffix(".weight"), in_features, out_features)
    total = sum(entry.bytes for entry in entries(checkpoint, blocks, layout))
    return Plan(spec, total, total * 8 / checkpoint.parameters, needs_calibration=True)


def entries(checkpoint: Checkpoint, blocks: DecoderBlocks, layout: LinearLayout) -> list[Entry]:
    """All tensors of the quantized checkpoint, those outside of the blocks first."""
    from quantkit.formats.shards import Entry

    def stored(name: str) -> Entry:
        return Entry(name, checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)

    found = [stored(name) for name in blocks.tensors_outside()]
    for index in range(len(blocks)):
        for name in blocks.state_names:
            full = blocks.prefix(index) + name
            linear = name.removesuffix(".weight")
            if linear not in blocks.linears:
                found.append(stored(full))
                continue
            out_features, in_features = checkpoint.tensors[full].shape
            for part, (dtype, shape) in layout.shapes(in_features, out_features).items():
                found.append(Entry(f"{full.removesuffix('weight')}{part}", dtype, shape))
    return found


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


def write_config(checkpoint: Checkpoint, directory: Path, quantization: dict[str, Any]) -> None:
    """The source's config.json with ``quantization_config`` added, nothing else changed."""
    config = {**checkpoint.config, "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
