"""The compressed-tensors format, as llm-compressor writes it: ``pack-quantized`` weights, read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import IncompatibleVariant, reading
from quantkit.formats.packed import Packed, Quantization, unpack_linears
from quantkit.models.variant import Variant

if TYPE_CHECKING:
    import torch

LAYOUT = "pack-quantized"
_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_OPTIONAL = ("weight_zero_point", "weight_g_idx")
_STRATEGIES = ("group", "channel", "tensor")
_BITS = (2, 4, 8)
"""Bits that divide a word; for others there are files with and without gaps between words."""


class CompressedTensors(Packed):
    """``pack-quantized`` files of llm-compressor."""

    name = "compressed-tensors"

    def dequantize(self, variant: Variant) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``Format.dequantize``.

        Raise IncompatibleVariant for what is more, or other, than packed integer weights.
        """
        quantization = Quantization.opened(variant.path)
        with reading(quantization.file):
            check(quantization)
        yield from unpack_linears(variant.path, _PARTS, _OPTIONAL, unpack)


def unpack(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_shape: torch.Tensor,
    *,
    weight_zero_point: torch.Tensor | None,
    weight_g_idx: torch.Tensor | None,
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
        zeros = torch.zeros(rows, groups, dtype=torch.int32)
    elif weight_zero_point.dtype == torch.int32 and weight_zero_point.shape[0] != rows:
        zeros = unpack_columns(weight_zero_point.T.contiguous(), bits)[:, :rows].T - half
    else:
        zeros = weight_zero_point.int().view(-1, groups)
    group = (
        weight_g_idx.long()
        if weight_g_idx is not None
        else torch.arange(columns) // (columns // groups)
    )
    weight: torch.Tensor = (codes - zeros[:, group]) * scale[:, group]
    return weight


def check(quantization: Quantization) -> None:
    """Raise IncompatibleVariant, naming the key, for settings that unpacking would not honour."""
    quantization.require("quantization_status", "compressed")
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = quantization.config.get(key)
        if value and value.get("format", "") != "dense":
            raise IncompatibleVariant(
                f"{quantization.path}: has a {key}, which quantkit does not read; it reads "
                f"{LAYOUT} weights alone"
            )
    groups: dict[str, Mapping[str, Any]] = quantization.config.get("config_groups") or {}
    if not groups:
        raise IncompatibleVariant(f"{quantization.path}: its quantization_config has no groups")
    for name, group in groups.items():
        _check_group(quantization, name, group)


def _check_group(quantization: Quantization, name: str, group: Mapping[str, Any]) -> None:
    weights: Mapping[str, Any] = group.get("weights") or {}
    layout = group.get("format") or quantization.config.get("format")
    wrong = None
    if layout != LAYOUT:
        wrong = f"format {layout!r}; quantkit reads {LAYOUT!r}"
    elif group.get("input_activations") or group.get("output_activations"):
        wrong = "activations that are quantized too; quantkit reads weights only (W4A16, W8A16)"
    elif weights.get("type", "int") != "int":
        wrong = f"weights of type {weights['type']!r}; quantkit reads 'int'"
    elif weights.get("num_bits") not in _BITS:
        wrong = f"{weights.get('num_bits')} bits; quantkit reads 2, 4 and 8"
    elif weights.get("strategy") not in _STRATEGIES:
        wrong = f"strategy {weights.get('strategy')!r}; quantkit reads {', '.join(_STRATEGIES)}"
    if wrong:
        raise IncompatibleVariant(f"{quantization.path}: {name} has {wrong}")
