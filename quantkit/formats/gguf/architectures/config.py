"""A configuration of transformers under one set of names."""

from __future__ import annotations

from typing import Any

from quantkit.formats.gguf.architectures.architecture import Config
from quantkit.formats.gguf.architectures.rope import rope_values

_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
}
"""Names that some families have for what most call otherwise."""

_RECURRENT = ("linear_attention", "conv")
"""Kinds of blocks that do not attend."""


def resolve(config: dict[str, Any]) -> Config:
    """``config``, as transformers' ``to_dict`` gives it, with one name for one thing.

    Adds what ``rope_values`` says and the sizes that follow from others: ``head_size`` (also where
    there is no ``head_dim``), ``q``, ``kv`` and ``qkv`` (all heads of a kind side by side),
    ``rotary_size`` (the channels of a head that rotate), with latent attention ``kv_a``, ``kv_b``
    and ``v``, with linear attention ``linear_v`` and ``linear_qkv``; and ``recurrent_layers``, for
    each block whether it is of a kind that does not attend.
    """
    c = config | {name: config[alias] for alias, name in _ALIASES.items() if alias in config}
    if c.get("intermediate_size") is None:
        c["intermediate_size"] = 4 * c["hidden_size"]
    c |= rope_values(config)
    heads, kv_heads = c["num_attention_heads"], c.get("num_key_value_heads")
    head = c.get("head_dim") or c["hidden_size"] // heads
    c["head_size"] = head
    c["q"], c["kv"] = heads * head, (kv_heads or heads) * head
    c["qkv"] = c["q"] + 2 * c["kv"]
    c["rotary_size"] = int(c["rope"].get("partial_rotary_factor", 1.0) * head)
    if "kv_lora_rank" in c:
        rotary, plain = c["qk_rope_head_dim"], c["qk_nope_head_dim"]
        c["q"], c["v"] = heads * (plain + rotary), heads * c["v_head_dim"]
        c["kv_a"] = c["kv_lora_rank"] + rotary
        c["kv_b"] = heads * (plain + c["v_head_dim"])
        c["rotary_size"] = rotary
    c["recurrent_layers"] = [kind in _RECURRENT for kind in c.get("layer_types") or ()]
    if "linear_num_value_heads" in c:
        c["linear_v"] = c["linear_num_value_heads"] * c["linear_value_head_dim"]
        keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
        c["linear_qkv"] = 2 * keys + c["linear_v"]
    return c
