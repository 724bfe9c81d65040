"""How a linear of each scheme lies in a file that quantkit writes, as several tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from quantkit.formats import decoding
from quantkit.formats.compressed_tensors.encodings import unpack
from quantkit.formats.compressed_tensors.presets import MXFP4, NVFP4, PACKED, Preset
from quantkit.formats.integer_linears import Floats, Integers, LinearLayout, Shapes
from quantkit.models.spec import GroupScheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PresetScheme(GroupScheme):
    """Bits, and how many inputs share a scale: -1 for all, in which blocks count as well."""

    preset: Preset

    @classmethod
    def of(cls, preset: Preset) -> PresetScheme:
        """That of a scheme of compressed-tensors."""
        size = None if preset.weights.strategy == "block" else preset.weights.group_size
        return cls(preset.weights.num_bits, size or -1, preset)

    def __str__(self) -> str:
        return self.preset.name


def layout(preset: Preset, dtype: str) -> LinearLayout:
    """``dtype``: of the source's weights in safetensors' words, which most scales have.

    Of floats ``pack`` is given the tensors (``quantize/float_weights.py``).
    """
    scheme = PresetScheme.of(preset)
    weights = preset.weights

    def groups(inputs: int) -> int:
        return inputs // scheme.columns(inputs)

    def packed(inputs: int, outputs: int) -> Shapes:
        words = inputs * weights.num_bits // 32
        found: Shapes = {
            "weight_packed": ("I32", (outputs, words)),
            "weight_scale": (dtype, (outputs, groups(inputs))),
            "weight_shape": ("I64", (2,)),
        }
        if not weights.symmetric:
            rows = outputs * weights.num_bits // 32
            found["weight_zero_point"] = ("I32", (rows, groups(inputs)))
        return found

    def bytes_(inputs: int, outputs: int) -> Shapes:
        high, wide = weights.block or (1, inputs)
        scales = -(-outputs // high), -(-inputs // wide)
        kind = "I8" if preset.is_integer else "F8_E4M3"
        return {"weight": (kind, (outputs, inputs)), "weight_scale": (dtype, scales)}

    def halves(inputs: int, outputs: int) -> Shapes:
        found: Shapes = {
            "weight_packed": ("U8", (outputs, inputs // 2)),
            "weight_scale": ("U8", (outputs, groups(inputs))),
        }
        if preset.layout == NVFP4:
            found["weight_scale"] = ("F8_E4M3", (outputs, groups(inputs)))
            found["weight_global_scale"] = ("F32", (1,))
        if preset.scales_whole_inputs:
            found["input_global_scale"] = ("F32", (1,))
        return found

    if preset.layout == PACKED:
        pack = partial(_pack, bits=weights.num_bits, symmetric=weights.symmetric, dtype=dtype)
        return LinearLayout(scheme, packed, pack, unpack)
    if preset.layout in (NVFP4, MXFP4):
        halved = _nvfp4 if preset.layout == NVFP4 else decoding.mxfp4_rows
        return LinearLayout(scheme, halves, _as_given, halved)
    signed = partial(_signed, dtype=dtype)
    read = partial(decoding.scaled, block=weights.block)
    return LinearLayout(
        scheme, bytes_, signed if preset.is_integer else _as_given, read, weights.block
    )


def _pack(integers: Integers, *, bits: int, symmetric: bool, dtype: str) -> dict[str, torch.Tensor]:
    import torch

    from quantkit.formats.packing import pack_columns, pack_rows
    from quantkit.models.dtypes import torch_dtype

    found = {
        "weight_packed": pack_columns(integers.codes, bits),
        "weight_scale": integers.scales.to(torch_dtype(dtype)),
        "weight_shape": torch.tensor(integers.codes.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = pack_rows(integers.zeros, bits)
    return found


def _signed(integers: Integers, *, dtype: str) -> dict[str, torch.Tensor]:
    """Integers whose zeros are all half their range, as they are computed with."""
    import torch

    from quantkit.models.dtypes import torch_dtype

    codes = integers.codes.int() - integers.zeros.repeat_interleave(integers.group_size, 1)
    scales = integers.scales.to(torch_dtype(dtype))
    return {"weight": codes.to(torch.int8), "weight_scale": scales}


def _as_given(floats: Floats) -> dict[str, torch.Tensor]:
    return dict(floats.tensors)


def _nvfp4(
    packed: torch.Tensor, scale: torch.Tensor, whole: torch.Tensor, *_of_inputs: torch.Tensor
) -> torch.Tensor:
    return decoding.nvfp4(packed, scale, whole)
