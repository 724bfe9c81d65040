"""Quantizes a checkpoint with AutoRound into its own formats, and says what it computes with.

A script for the interpreter of its environment. Arguments: the source, and where to write
``auto_gptq/``, ``own/`` and ``auto_awq/``, with one layer left as it is and, but for AWQ, one of
8 bits; of the first two also ``<name>.safetensors``, the weights of the package's own modules.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

KINDS = {
    "auto_gptq": ("auto_round", True),
    "own": ("auto_round", False),
    "auto_awq": ("auto_round:auto_awq", False),
}
LEFT = {"model.layers.0.mlp.down_proj": {"bits": 16}}
EIGHT = {"model.layers.1.self_attn.q_proj": {"bits": 8, "group_size": 32}}


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    ids = torch.randint(3, 1000, (8, 32), generator=torch.Generator().manual_seed(0))
    for name, (packing, symmetric) in KINDS.items():
        rounder = AutoRound(
            str(source),
            scheme="W4A16",
            group_size=64,
            sym=symmetric,
            iters=0,
            dataset=[{"input_ids": ids, "attention_mask": None}],
            nsamples=8,
            seqlen=32,
            device_map="cpu",
            layer_config=LEFT if name == "auto_awq" else LEFT | EIGHT,
        )
        rounder.quantize_and_save(str(out / f"{name}-work"), format=packing)
        saved = next((out / f"{name}-work").rglob("config.json")).parent
        saved.rename(out / name)
        if name != "auto_awq":
            save_file(weights(out / name), out / f"{name}.safetensors")


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map="cpu")
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            answer = module(torch.eye(module.infeatures, dtype=module.scales.dtype))
            found[f"{name}.weight"] = answer.T.float().contiguous()
    return found


if __name__ == "__main__":
    main()
