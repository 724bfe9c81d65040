"""Tiny checkpoints whose files say something else of the weights than they seem to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models import make_checkpoint

ONLY = "model.safetensors"
INDEX = f"{ONLY}.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 256)}


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change what the first weight file holds, and the index where there is one."""
    file = min(directory.glob("model*.safetensors"))
    tensors = load_file(file)
    before = set(tensors)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = directory / INDEX
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] |= dict.fromkeys(tensors.keys() - before, file.name)
        index.write_text(json.dumps(content))


def with_another_head(directory: Path) -> None:
    """An output layer of its own, although config.json ties it."""
    generator = torch.Generator().manual_seed(7)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        like = next(
            t for n, t in tensors.items() if n.endswith(("embed_tokens.weight", "wte.weight"))
        )
        head = torch.randn(like.shape, generator=generator) * 0.05
        tensors[HEAD] = head.to(like.dtype)

    edit_tensors(directory, change)


def with_the_same_head(directory: Path) -> None:
    """The output layer stored although it is tied to the embedding, and equal."""
    edit_tensors(directory, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))


def with_the_head_alone(directory: Path) -> None:
    """As ``safetensors.torch.save_model`` saves tied weights: under the first of their names."""
    edit_tensors(directory, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))


def beside_older_shards(directory: Path) -> None:
    """``model.safetensors`` beside an index and shards of another model."""
    older = make_checkpoint(directory.parent / "older", seed=1, shards=2)
    for file in older.glob("model*"):
        file.rename(directory / file.name)


def beside_a_stale_index(directory: Path) -> None:
    """An index that names shards which are gone."""
    beside_older_shards(directory)
    for file in directory.glob("model-0*"):
        file.unlink()


def beside_other_weights(directory: Path) -> None:
    """Mistral's own file, a LoRA and the weights in another type."""
    tensors = load_file(directory / ONLY)
    save_file({"norm.weight": tensors["model.norm.weight"]}, directory / "consolidated.safetensors")
    save_file(ADAPTER, directory / "adapter_model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(zeros, directory / "model.fp16.safetensors", metadata={"format": "pt"})


def shards_beside_other_weights(directory: Path) -> None:
    """The same beside an index and its shards."""
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file(ADAPTER, directory / name)


def named_otherwise(directory: Path) -> None:
    """Weights in a file that config.json names, beside a ``model.safetensors`` of another model."""
    (directory / ONLY).rename(directory / "another.safetensors")
    (make_checkpoint(directory.parent / "older", seed=1) / ONLY).rename(directory / ONLY)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"transformers_weights": "another.safetensors"}
    path.write_text(json.dumps(config))


def with_masks(prefix: str, dtype: torch.dtype) -> Callable[[Path], None]:
    """What old versions stored of attention: a mask and what stands in its place."""

    def edit(directory: Path) -> None:
        mask = torch.ones(1, 1, 512, 512).tril().to(dtype)
        buffers = {f"{prefix}.bias": mask, f"{prefix}.masked_bias": torch.tensor(-1e4)}
        edit_tensors(directory, lambda tensors: tensors.update(buffers))

    return edit


def with_frequencies(directory: Path) -> None:
    """What old versions stored of the rotary embedding."""
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_tensors(directory, lambda tensors: tensors.update({name: torch.ones(32)}))


@dataclass(frozen=True)
class Case:
    """A model of transformers' ``family`` and what is done to its directory. ``note``: what is said
    of it; ``tied``: whether the output layer is the embedding."""

    edit: Callable[[Path], None]
    family: str = "llama"
    shards: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    tied: bool = True


_APART = "not tied, as by transformers"
CASES = {
    "another-head": Case(with_another_head, note=_APART, tied=False),
    "another-head-sharded": Case(with_another_head, shards=2, note=_APART, tied=False),
    "another-head-qwen2": Case(with_another_head, "qwen2", 2, note=_APART, tied=False),
    "another-head-gpt2": Case(with_another_head, "gpt2", note=_APART, tied=False),
    "another-head-gemma3": Case(
        with_another_head,
        "gemma3_text",
        config={"head_dim": 64, "query_pre_attn_scalar": 64},
        note=_APART,
        tied=False,
    ),
    "the-same-head": Case(with_the_same_head),
    "the-head-alone": Case(with_the_head_alone),
    "older-shards": Case(beside_older_shards, note="model-00001-of-00002.safetensors"),
    "stale-index": Case(beside_a_stale_index, note="ignored: model.safetensors.index.json"),
    "other-weights": Case(
        beside_other_weights, note="ignored: adapter_model.safetensors, consolidated.saf"
    ),
    "shards-and-others": Case(
        shards_beside_other_weights, shards=2, note="read from model.safetensors.index.json"
    ),
    "named-otherwise": Case(named_otherwise, note="ignored: model.safetensors"),
    "masks-gpt2": Case(with_masks("transformer.h.1.attn", torch.float32), "gpt2"),
    "masks-gpt2-bool": Case(with_masks("transformer.h.1.attn", torch.bool), "gpt2"),
    "masks-neox": Case(
        with_masks("gpt_neox.layers.1.attention", torch.bool),
        "gpt_neox",
        config={"tie_word_embeddings": False},
        tied=False,
    ),
    "masks-neox-bytes": Case(
        with_masks("gpt_neox.layers.1.attention", torch.uint8),
        "gpt_neox",
        config={"tie_word_embeddings": False},
        tied=False,
    ),
    "frequencies": Case(with_frequencies),
}


def make(case: Case, directory: Path) -> Path:
    """Write the checkpoint of ``case``."""
    path = make_checkpoint(directory, family=case.family, shards=case.shards, **case.config)
    case.edit(path)
    return path
