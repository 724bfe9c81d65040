"""How the tensors of compressed-tensors files stand for plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import IncompatibleVariant
from quantkit.formats import decoding
from quantkit.formats.compressed_tensors.groups import check_targets, group_of
from quantkit.formats.compressed_tensors.presets import FLOAT, INT, MXFP4, NVFP4, PACKED
from quantkit.formats.encoding import SHAPE, Encoding, Shape, block_size, scaled

if TYPE_CHECKING:
    import torch

_STRATEGIES = ("group", "channel", "tensor")
_BITS = (2, 4, 8)
"""Bits that divide a word; for others there are files with and without gaps between words."""


def encodings(config: Mapping[str, Any], file: Path) -> list[Encoding]:
    """Those of all groups of a ``quantization_config`` in ``file``.

    Raise IncompatibleVariant, naming the key, for what decoding would not honour.
    """
    if config.get("quantization_status", "compressed") != "compressed":
        raise IncompatibleVariant(
            f"{file}: quantization_status is {config['quantization_status']!r}; quantkit unpacks "
            "'compressed'"
        )
    for key in ("transform_config", "sparsity_config"):
        refuse_key(config, key, file)
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise IncompatibleVariant(f"{file}: its quantization_config has no groups")
    found: list[tuple[str, Encoding]] = []
    for name, group in groups.items():
        check_targets(group.get("targets"), f"{file}: {name}")
        layout = str(group.get("format") or config.get("format"))
        encoding = _encoding(layout, group.get("weights") or {}, f"{file}: {name}")
        found.append((layout, replace(encoding, is_for=partial(_may_be_of, name, groups))))
    # The first whose parts are all there decides, and the last has the fewest.
    found.sort(key=lambda one: one[0] not in (PACKED, NVFP4))
    return [encoding for _, encoding in found]


def _may_be_of(key: str, groups: Mapping[str, Mapping[str, Any]], linear: str) -> bool:
    """Whether a quantized linear is of this group, or none says that it is its."""
    return group_of(groups, linear) in (key, None)


def refuse_key(config: Mapping[str, Any], key: str, file: Path) -> None:
    """Raise IncompatibleVariant where the settings have it, and it is not of what is dense."""
    value = config.get(key)
    if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
        raise IncompatibleVariant(f"{file}: has a {key}, which quantkit does not decode")


def _encoding(layout: str, weights: Mapping[str, Any], where: str) -> Encoding:
    if layout in (FLOAT, INT, "naive-quantized"):
        block = block_size(weights.get("block_structure"), where)
        return scaled(".weight_scale", block, (".weight_zero_point",))
    if layout == NVFP4:
        return _NVFP4
    if layout == MXFP4:
        return _MXFP4
    if layout == PACKED:
        return _packed_integers(weights, where)
    raise IncompatibleVariant(
        f"{where} has format {layout!r}, which quantkit does not decode; it decodes {FLOAT}, "
        f"{INT}, naive-quantized, {NVFP4}, {MXFP4} and {PACKED}"
    )


def _halves(groups: int) -> Any:
    """Shapes of 4-bit floats, two in a byte, with a scale for each ``groups`` of them."""

    def shape(shapes: Mapping[str, Shape]) -> Shape:
        rows, half = shapes[".weight_packed"]
        if shapes[".weight_scale"] != (rows, half * 2 // groups) or half * 2 % groups:
            raise ValueError("scales")
        return rows, half * 2

    return shape


_NVFP4 = Encoding(
    (".weight_packed", ".weight_scale", ".weight_global_scale"),
    (),
    ".weight",
    _halves(16),
    decoding.nvfp4,
)
_MXFP4 = Encoding(
    (".weight_packed", ".weight_scale"), (), ".weight", _halves(32), decoding.mxfp4_rows
)


def _packed_integers(weights: Mapping[str, Any], where: str) -> Encoding:
    bits = weights.get("num_bits", 0)
    wrong = None
    if weights.get("type", "int") != "int":
        wrong = f"weights of type {weights['type']!r}; quantkit reads 'int'"
    elif bits not in _BITS:
        wrong = f"{bits} bits; quantkit reads 2, 4 and 8"
    elif weights.get("strategy") not in _STRATEGIES:
        wrong = f"strategy {weights.get('strategy')!r}; quantkit reads {', '.join(_STRATEGIES)}"
    if wrong:
        raise IncompatibleVariant(f"{where} has {wrong}")
    per_word = 32 // bits

    def shape(shapes: Mapping[str, Shape]) -> Shape:
        rows, words = shapes[".weight_packed"]
        return rows, words * per_word

    parts = (".weight_packed", ".weight_scale", SHAPE)
    return Encoding(parts, (".weight_zero_point", ".weight_g_idx"), ".weight", shape, unpack)


def unpack(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_shape: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """The (out, in) float32 weight of one linear.

    Integers are stored in rows of words, lowest bits first, each more by half their range than the
    signed integer that it stands for. ``weight_scale``: (out, groups), or (out, 1) and (1,).
    ``weight_zero_point``: (groups, out) packed along out, or (out, groups) int8 of older files.
    ``weight_g_idx``: (in,), the group of each input, where groups follow the activations' order.
    """
    import torch

    from quantkit.formats.packing import unpack_columns

    rows, columns = weight_shape.tolist()
    # Words hold whole numbers of 32 integers but for the last ones of a row.
    bits = weight_packed.shape[1] * 32 // columns
    half = 1 << (bits - 1)
    codes = unpack_columns(weight_packed, bits)[:, :columns] - half
    scale = weight_scale.float().view(-1, weight_scale.shape[-1])
    groups = scale.shape[1]
    if weight_zero_point is None:
        zeros = torch.zeros(rows, groups, dtype=torch.int32, device=codes.device)
    elif weight_zero_point.dtype == torch.int32 and weight_zero_point.shape[0] != rows:
        zeros = unpack_columns(weight_zero_point.T.contiguous(), bits)[:, :rows].T - half
    else:
        zeros = weight_zero_point.int().view(-1, groups)
    group = (
        weight_g_idx.long()
        if weight_g_idx is not None
        else torch.arange(columns, device=codes.device) // (columns // groups)
    )
    weight: torch.Tensor = (codes - zeros[:, group]) * scale[:, group]
    return weight
