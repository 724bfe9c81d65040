"""Quantizes a checkpoint with the package compressed-tensors, as llm-compressor does in the end.

A script for the interpreter of an environment that has the package. Arguments: the source, and
where to write ``symmetric/`` and ``asymmetric/``. Beside each checkpoint lies ``expected/``, the
weights as the package itself unpacks them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file

GROUP_SIZE = 64


def main() -> None:
    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    compress(source, output / "symmetric", symmetric=True)
    compress(source, output / "asymmetric", symmetric=False)


def compress(source: Path, output: Path, *, symmetric: bool) -> None:
    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=GROUP_SIZE
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors, expected = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        groups = tensor.view(tensor.shape[0], -1, GROUP_SIZE).float()
        if symmetric:
            scale = groups.abs().amax(-1) / 7.5
            zero = torch.zeros_like(scale)
        else:
            scale = (groups.amax(-1) - groups.amin(-1)) / 15
            zero = (-8 - groups.amin(-1) / scale).round().clamp(-8, 7)
        state = {
            "weight": tensor,
            "weight_scale": scale.to(tensor.dtype),
            "weight_zero_point": zero.to(torch.int8),
        }
        packed = PackedQuantizationCompressor.compress(state, scheme)
        stem = name.removesuffix("weight")
        tensors |= {stem + part: value.contiguous() for part, value in packed.items()}
        expected[name] = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    (output / "expected").mkdir(parents=True)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, output / "expected" / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    ).to_dict()
    (output / "config.json").write_text(json.dumps(config, default=str))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (output / name).write_bytes((source / name).read_bytes())


if __name__ == "__main__":
    main()
