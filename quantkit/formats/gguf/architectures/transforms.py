"""What is done to tensors that llama.cpp stores differently from transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.formats.gguf.architectures.architecture import Config

if TYPE_CHECKING:
    import torch


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from halves (0 … d/2, d/2 … d) to pairs (0, d/2, 1, d/2+1 …).

    rows: (heads * head_dim, ...). Some of llama.cpp's rotary embeddings pair neighbouring channels
    where transformers pairs the two halves of a head.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def interleave_queries(rows: torch.Tensor, c: Config) -> torch.Tensor:
    """See ``interleave``."""
    return interleave(rows, c["num_attention_heads"])


def interleave_keys(rows: torch.Tensor, c: Config) -> torch.Tensor:
    """See ``interleave``."""
    return interleave(rows, c["num_key_value_heads"])


def plus_one(weight: torch.Tensor, _: Config) -> torch.Tensor:
    """Gemma multiplies by 1 + weight, llama.cpp by what it finds; float16 is added to as it is, as
    in llama.cpp's converter."""
    import torch

    return (weight if weight.dtype == torch.float16 else weight.float()) + 1


def transpose(weight: torch.Tensor, _: Config) -> torch.Tensor:
    """GPT-2's Conv1D holds (in, out), a linear layer (out, in)."""
    return weight.T if weight.ndim == 2 else weight


def ungroup_heads(rows: torch.Tensor, c: Config) -> torch.Tensor:
    """From GPT-NeoX's q, k and v of each head in turn to all q, all k, all v."""
    grouped = rows.reshape(c["num_attention_heads"], 3, -1, *rows.shape[1:])
    return grouped.swapaxes(0, 1).reshape(rows.shape)


def latent_keys(rows: torch.Tensor, c: Config) -> torch.Tensor:
    """DeepSeek's k part of kv_b, (heads, kv_lora_rank, qk_nope_head_dim): llama.cpp multiplies the
    queries by it, and so never expands the keys."""
    return _latent(rows, c)[:, : c["qk_nope_head_dim"]].swapaxes(1, 2)


def latent_values(rows: torch.Tensor, c: Config) -> torch.Tensor:
    """DeepSeek's v part of kv_b, (heads, v_head_dim, kv_lora_rank)."""
    return _latent(rows, c)[:, c["qk_nope_head_dim"] :]


def _latent(rows: torch.Tensor, c: Config) -> torch.Tensor:
    heads = c["num_attention_heads"]
    return rows.reshape(heads, rows.shape[0] // heads, rows.shape[1])
