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
    return _computed(weight) + 1


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


def first_half(stack: torch.Tensor, _: Config) -> torch.Tensor:
    """The gates of experts whose gate and up projection are one, (experts, 2 * size, ...)."""
    return stack.chunk(2, 1)[0]


def second_half(stack: torch.Tensor, _: Config) -> torch.Tensor:
    """The up projections of the same."""
    return stack.chunk(2, 1)[1]


def turned(stack: torch.Tensor, _: Config) -> torch.Tensor:
    """Of experts (in, out), where llama.cpp has (out, in); biases as they are."""
    return stack.swapaxes(1, 2) if stack.ndim == 3 else stack


def first_of_pairs(stack: torch.Tensor, c: Config) -> torch.Tensor:
    """The gates of experts (in, out) whose gate and up projection take turns."""
    return turned(stack[..., ::2], c)


def second_of_pairs(stack: torch.Tensor, c: Config) -> torch.Tensor:
    """The up projections of the same."""
    return turned(stack[..., 1::2], c)


def kernel(weight: torch.Tensor, _: Config) -> torch.Tensor:
    """A convolution of each channel by itself, (channels, 1, width), as (channels, width)."""
    return weight.squeeze(1)


def tile(rows: torch.Tensor, c: Config) -> torch.Tensor:
    """Reorder the value heads of a gated delta net.

    rows: (value heads * rows of each, ...). transformers puts the value
    heads of one key head side by side; llama.cpp repeats the key heads as a whole: it wants the
    first value head of each, then the second of each.
    """
    groups = c["linear_num_key_heads"]
    of_each = c["linear_num_value_heads"] // groups
    grouped = rows.reshape(groups, of_each, -1, *rows.shape[1:])
    return grouped.swapaxes(0, 1).reshape(rows.shape)


def tile_columns(weight: torch.Tensor, c: Config) -> torch.Tensor:
    """The columns reordered, see ``tile``."""
    return tile(weight.T, c).T


def tile_after_keys(rows: torch.Tensor, c: Config) -> torch.Tensor:
    """Of queries, keys and values side by side the values reordered, see ``tile``."""
    import torch

    values = len(rows) - c["linear_v"]
    return torch.cat([rows[:values], tile(rows[values:], c)])


def tiled_kernel(weight: torch.Tensor, c: Config) -> torch.Tensor:
    """See ``kernel`` and ``tile_after_keys``."""
    return tile_after_keys(kernel(weight, c), c)


def tiled_decay(logarithm: torch.Tensor, c: Config) -> torch.Tensor:
    """transformers stores the logarithm of the decay and negates it, see ``tile``."""
    return -_computed(tile(logarithm, c)).exp()


COLUMNS = (tile_columns,)
"""Those that reorder the columns: what a matrix is multiplied with is reordered as they are."""


def _computed(weight: torch.Tensor) -> torch.Tensor:
    """In the type in which llama.cpp's converter computes: float16 as it is, all else float32."""
    import torch

    return weight if weight.dtype == torch.float16 else weight.float()
