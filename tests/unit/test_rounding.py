"""Scales and integers against loops over numpy-free arithmetic."""

from __future__ import annotations

import torch

from quantkit.formats.integer_linears import Integers
from quantkit.quantize.awq import Grid
from quantkit.quantize.rounding import (
    asymmetric_range,
    asymmetric_scales,
    plain_symmetric,
    storable,
    symmetric_scales,
)
from tests.block_outputs import on_grid


def _weights(rows: int = 8, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def test_dequantize_is_code_minus_zero_times_scale() -> None:
    integers = Integers(
        codes=torch.tensor([[0, 15, 8, 9]], dtype=torch.int32),
        scales=torch.tensor([[0.5, -2.0]]),
        zeros=torch.tensor([[8, 7]], dtype=torch.int32),
    )
    assert integers.dequantize().tolist() == [[-4.0, 3.5, -2.0, -4.0]]


def test_plain_symmetric_is_the_textbook() -> None:
    weights = _weights()
    integers = plain_symmetric(weights, 4, 64, torch.float32)
    for row in range(8):
        for group in range(2):
            part = weights[row, group * 64 : (group + 1) * 64]
            scale = torch.tensor(float(part.abs().max()) / 7).half().item()
            assert integers.scales[row, group].item() == scale
            for i, w in enumerate(part.tolist()):
                code = max(-8, min(7, round(w / scale))) + 8
                assert integers.codes[row, group * 64 + i].item() == code


def test_asymmetric_range_covers_the_extremes() -> None:
    weights = _weights()
    error = (on_grid(weights, Grid(4, 64, torch.float32)) - weights).abs().view(8, 2, 64)
    low, high = weights.view(8, 2, 64).amin(-1), weights.view(8, 2, 64).amax(-1)
    # Half a step, and half another where the zero point itself was rounded.
    assert (error <= ((high - low) / 15).unsqueeze(-1) * 1.001).all()


def test_searched_scales_lose_no_more_than_any_plain_one() -> None:
    weights = _weights(16, 64)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1

    def loss(scales: torch.Tensor) -> torch.Tensor:
        codes = (weights / scales[:, None]).round().clamp(-8, 7)
        return ((codes * scales[:, None] - weights).square() * importance).sum(-1)

    searched = symmetric_scales(weights.T, 4, importance[:, None], torch.float32)
    plain = storable(weights.abs().amax(-1) / 7, torch.float32)
    assert (loss(searched) <= loss(plain) * 1.02).all()
    assert loss(searched).mean() < 0.85 * loss(plain).mean()


def test_searched_ranges_lose_no_more_than_the_whole_range() -> None:
    weights = _weights(16, 64) + 0.3
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1

    def loss(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        codes = ((weights / scales[:, None]).round() + zeros[:, None]).clamp(0, 15)
        lost = (codes - zeros[:, None]) * scales[:, None] - weights
        return (lost.square() * importance).sum(-1)

    searched = asymmetric_scales(weights.T, 4, importance[:, None], torch.float32)
    whole = asymmetric_range(weights.amin(-1), weights.amax(-1), 4, torch.float32)
    assert (loss(*searched) <= loss(*whole)).all()
    assert loss(*searched).mean() < 0.99 * loss(*whole).mean()


def test_scales_survive_the_file_and_the_engine() -> None:
    weights = _weights()
    for dtype in (torch.bfloat16, torch.float16):
        scales = symmetric_scales(weights.T, 4, torch.ones(128, 1), dtype)
        assert torch.equal(scales, scales.half().to(dtype).float())


def test_a_group_of_zeros_stays_zero() -> None:
    zeros = torch.zeros(4, 64)
    assert torch.equal(on_grid(zeros, Grid(4, 64, torch.bfloat16)), zeros)
    assert torch.equal(plain_symmetric(zeros, 4, 64, torch.bfloat16).dequantize(), zeros)
