"""Checkpoints as other packages lay them out, packed by slow loops over Python's integers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LINEARS = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")
"""Those that are packed; the others stay as they are."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Drawn:
    """Random integers for one linear: weight[o][i] = scale[o][g] * (code[o][i] - zero[o][g])."""

    codes: list[list[int]]
    zeros: list[list[int]]
    scales: torch.Tensor
    """(out, groups) float16."""
    group: list[int]
    """Of each input."""

    def weight(self) -> torch.Tensor:
        rows = [
            [(code - zeros[g]) for code, g in zip(codes, self.group, strict=True)]
            for codes, zeros in zip(self.codes, self.zeros, strict=True)
        ]
        return torch.tensor(rows).float() * self.scales.float()[:, self.group]


def draw(
    shape: Sequence[int], bits: int, groups: int, *, symmetric: bool = False, shuffled: bool = False
) -> Drawn:
    """``shuffled``: inputs belong to groups in no order, as with ``desc_act``."""
    generator = torch.Generator().manual_seed(shape[0] + bits)
    outputs, inputs = shape

    def integers(*size: int, low: int = 0) -> list[list[int]]:
        drawn: list[list[int]] = torch.randint(low, 2**bits, size, generator=generator).tolist()
        return drawn

    group = torch.arange(inputs) // (inputs // groups)
    if shuffled:
        group = group[torch.randperm(inputs, generator=generator)]
    half = [[2 ** (bits - 1)] * groups] * outputs
    return Drawn(
        integers(outputs, inputs),
        half if symmetric else integers(outputs, groups, low=1),
        (torch.rand(outputs, groups, generator=generator) * 0.01 + 1e-3).half(),
        group.tolist(),
    )


def words(rows: Sequence[Sequence[int]], bits: int) -> torch.Tensor:
    """Each row as one long number, its first integer lowest, cut into int32."""
    packed = []
    for row in rows:
        number = sum(code << bits * place for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        packed.append([number >> 32 * place & 0xFFFFFFFF for place in range(count)])
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)


def transposed(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


def as_gptq(drawn: Drawn, bits: int, *, stored_less: int, g_idx: bool) -> dict[str, torch.Tensor]:
    zeros = [[zero - stored_less for zero in row] for row in transposed(drawn.zeros)]
    parts = {
        "qweight": words(drawn.codes, bits).T.contiguous(),
        "qzeros": words(zeros, bits),
        "scales": drawn.scales.T.contiguous(),
    }
    return parts | ({"g_idx": torch.tensor(drawn.group, dtype=torch.int32)} if g_idx else {})


def as_awq(drawn: Drawn) -> dict[str, torch.Tensor]:
    def ordered(rows: list[list[int]]) -> list[list[int]]:
        places = [8 * eight + slot for eight in range(len(rows[0]) // 8) for slot in AWQ_ORDER]
        return [[row[place] for place in places] for row in rows]

    return {
        "qweight": words(ordered(transposed(drawn.codes)), 4),
        "qzeros": words(ordered(transposed(drawn.zeros)), 4),
        "scales": drawn.scales.T.contiguous(),
    }


def as_compressed(
    drawn: Drawn, bits: int, *, asymmetric: bool, g_idx: bool = False, old_zeros: bool = False
) -> dict[str, torch.Tensor]:
    parts = {
        "weight_packed": words(drawn.codes, bits),
        "weight_scale": drawn.scales.to(torch.float32),
        "weight_shape": torch.tensor([len(drawn.codes), len(drawn.codes[0])]),
    }
    if asymmetric and old_zeros:
        signed = [[zero - 2 ** (bits - 1) for zero in row] for row in drawn.zeros]
        parts["weight_zero_point"] = torch.tensor(signed, dtype=torch.int8)
    elif asymmetric:
        parts["weight_zero_point"] = words(transposed(drawn.zeros), bits).T.contiguous()
    if g_idx:
        parts["weight_g_idx"] = torch.tensor(drawn.group, dtype=torch.int32)
    return parts


def write(
    source: Path,
    directory: Path,
    parts: dict[str, dict[str, torch.Tensor]],
    quantization: dict[str, Any],
) -> Path:
    """``source`` with the weights of the linears in ``parts`` replaced by their parts."""
    directory.mkdir()
    tensors = load_file(source / "model.safetensors")
    for linear, packed in parts.items():
        del tensors[f"{linear}.weight"]
        tensors |= {f"{linear}.{part}": tensor for part, tensor in packed.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    content = {**config, "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(content))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    return directory
