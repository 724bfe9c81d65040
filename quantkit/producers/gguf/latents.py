"""DeepSeek's latent attention, watched where llama.cpp multiplies otherwise than transformers.

llama.cpp has the two halves of ``kv_b`` apart. It multiplies the queries by the half that would
make keys of latents, and, by the half that would make values of them, what attention mixes of the
latents for each head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quantkit.formats.gguf.architectures import transforms
from quantkit.formats.gguf.architectures.architecture import Transform

Add = Callable[[torch.Tensor], None]

_WATCHED = "sdpa_with_latents_watched"


def _watch_queries(attention: Any, add: Add) -> None:
    """Have ``add`` called with (batch, T, heads * qk_nope_head_dim)."""

    def hook(_: Any, __: Any, queries: torch.Tensor) -> None:
        heads = queries.view(*queries.shape[:-1], attention.num_heads, attention.qk_head_dim)
        add(heads[..., : attention.qk_nope_head_dim].flatten(-2))

    (attention.q_proj or attention.q_b_proj).register_forward_hook(hook)


def _watch_mixed_latents(attention: Any, add: Add) -> None:
    """Have ``add`` called with (batch, T, heads * kv_lora_rank)."""

    def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        attention.latents = inputs[0]

    attention.kv_b_proj.register_forward_pre_hook(hook)
    attention.add_mixed_latents = add
    attention.config._attn_implementation = _WATCHED


def _attend(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    latents = attention.latents.expand(-1, attention.num_heads, -1, -1)
    mixed, _ = sdpa_attention_forward(attention, query, key, latents, mask, **settings)
    attention.add_mixed_latents(mixed.flatten(-2))
    output, _ = sdpa_attention_forward(attention, query, key, value, mask, **settings)
    return output, None


AttentionInterface.register(_WATCHED, _attend)

WATCH: dict[Transform, Callable[[Any, Add], None]] = {
    transforms.latent_keys: _watch_queries,
    transforms.latent_values: _watch_mixed_latents,
}
"""How to watch the inputs of what a transform makes of ``kv_b``: given the attention module."""
