"""Rounding to nearest, nothing searched: what every quantizer has to beat."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

_LINEAR = re.compile(r"model\.layers\.\d+\..*\.weight")


def rounded(
    source: Path, bits: int, group_size: int, *, symmetric: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, the linears of its blocks rounded."""
    from safetensors import safe_open

    fake = round_symmetric if symmetric else round_asymmetric
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                tensor = tensors.get_tensor(name)
                if tensor.ndim == 2 and _LINEAR.fullmatch(name):
                    tensor = fake(tensor, bits, group_size)
                yield name, tensor


def round_symmetric(weights: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """To integers of ±(2**(bits-1) - 1) times a scale for each group; float32."""
    half = 1 << (bits - 1)
    grouped = weights.float().unflatten(1, (-1, group_size))
    scales = _stored(grouped.abs().amax(-1, keepdim=True) / (half - 1), weights.dtype)
    return ((grouped / scales).round().clamp(-half, half - 1) * scales).flatten(1)


def round_asymmetric(weights: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """To integers in [0, 2**bits) less a zero, times a scale, for each group; float32."""
    top = (1 << bits) - 1
    grouped = weights.float().unflatten(1, (-1, group_size))
    low = grouped.amin(-1, keepdim=True).clamp(max=0)
    high = grouped.amax(-1, keepdim=True).clamp(min=0)
    scales = _stored((high - low) / top, weights.dtype)
    zeros = (-low / scales).round().clamp(0, top)
    codes = ((grouped / scales).round() + zeros).clamp(0, top)
    return ((codes - zeros) * scales).flatten(1)


def _stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As a file (float16) and an engine (the model's type) hold them; never 0."""
    stored = scales.to(dtype).half().float()
    return stored.where(stored != 0, torch.ones_like(stored))
