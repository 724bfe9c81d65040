"""Modules that families have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quantkit.formats.gguf.architectures import transforms
from quantkit.formats.gguf.architectures.architecture import Module

EMBEDDING = Module("model.embed_tokens", "token_embd", "vocab_size hidden_size")
NORM = Module("model.norm", "output_norm", "hidden_size")
HEAD = Module("lm_head", "output", "vocab_size hidden_size", optional="tie_word_embeddings")
OUTER = (EMBEDDING, NORM, HEAD)

NORMS = (
    Module("input_layernorm", "attn_norm", "hidden_size"),
    Module("post_attention_layernorm", "ffn_norm", "hidden_size"),
)
POST_NORMS = (NORMS[0], replace(NORMS[1], name="post_attention_norm"))
"""The same under the names that llama.cpp has for them in newer architectures."""
HEAD_NORMS = (
    Module("self_attn.q_norm", "attn_q_norm", "head_size"),
    Module("self_attn.k_norm", "attn_k_norm", "head_size"),
)

GATED_AS_ONE = (
    Module("mlp.gate_up_proj", "ffn_up", "2*intermediate_size hidden_size"),
    Module("mlp.down_proj", "ffn_down", "hidden_size intermediate_size"),
)
"""A feed-forward network whose gate and up projection are one matrix."""

_SWIGLU = {"down_proj": "down", "gate_proj": "gate", "up_proj": "up"}


def attention(bias: str | bool = False, output_bias: str | bool = False) -> tuple[Module, ...]:
    """Queries, keys, values and output."""
    return (
        Module("self_attn.q_proj", "attn_q", "q hidden_size", bias=bias),
        Module("self_attn.k_proj", "attn_k", "kv hidden_size", bias=bias),
        Module("self_attn.v_proj", "attn_v", "kv hidden_size", bias=bias),
        Module("self_attn.o_proj", "attn_output", "hidden_size q", bias=output_bias),
    )


def interleaved(attention: tuple[Module, ...]) -> tuple[Module, ...]:
    """The same for an architecture whose rotary embedding pairs neighbouring channels."""
    q, k, v, output = attention
    return (
        replace(q, transform=transforms.interleave_queries),
        replace(k, transform=transforms.interleave_keys),
        v,
        output,
    )


def gated(
    prefix: str = "mlp.",
    suffix: str = "",
    size: str = "intermediate_size",
    *,
    parts: Mapping[str, str] = _SWIGLU,
    bias: str | bool = False,
    when: str = "",
) -> tuple[Module, ...]:
    """A feed-forward network with a gate; ``prefix`` with a star: as many as there are experts.

    ``parts`` is in the order in which llama.cpp's converter writes what it stacks.
    """
    experts = "num_experts " if "*" in prefix else ""
    return tuple(
        Module(
            f"{prefix}{source}",
            f"ffn_{part}{suffix}",
            experts + (f"hidden_size {size}" if part == "down" else f"{size} hidden_size"),
            bias=bias,
            when=when,
        )
        for source, part in parts.items()
    )


def stacked_experts(prefix: str) -> tuple[Module, ...]:
    """The experts of a checkpoint that has them as one tensor, gates above up projections."""
    both, down = (
        "num_experts 2*moe_intermediate_size hidden_size",
        "num_experts hidden_size moe_intermediate_size",
    )
    modules = (
        Module(f"{prefix}gate_up_proj", "ffn_gate_exps.weight", both, transforms.first_half),
        Module(f"{prefix}gate_up_proj", "ffn_up_exps.weight", both, transforms.second_half),
        Module(f"{prefix}down_proj", "ffn_down_exps.weight", down),
    )
    return tuple(replace(module, alone=True, when="stacked") for module in modules)


def turned_experts(prefix: str) -> tuple[Module, ...]:
    """gpt-oss's experts: matrices as (in, out), gates and up projections by turns; biases."""
    first, second = transforms.first_of_pairs, transforms.second_of_pairs
    both, down = (
        "num_experts hidden_size 2*intermediate_size",
        "num_experts intermediate_size hidden_size",
    )
    modules = (
        Module(f"{prefix}gate_up_proj", "ffn_gate_exps.weight", both, first),
        Module(f"{prefix}gate_up_proj", "ffn_up_exps.weight", both, second),
        Module(f"{prefix}down_proj", "ffn_down_exps.weight", down, transforms.turned),
        Module(
            f"{prefix}gate_up_proj_bias",
            "ffn_gate_exps.bias",
            "num_experts 2*intermediate_size",
            first,
        ),
        Module(
            f"{prefix}gate_up_proj_bias",
            "ffn_up_exps.bias",
            "num_experts 2*intermediate_size",
            second,
        ),
        Module(f"{prefix}down_proj_bias", "ffn_down_exps.bias", "num_experts hidden_size"),
    )
    return tuple(replace(module, alone=True) for module in modules)


def router(source: str, when: str = "") -> Module:
    """What chooses the experts."""
    return Module(source, "ffn_gate_inp", "num_experts hidden_size", when=when)


def when(key: str, modules: tuple[Module, ...]) -> tuple[Module, ...]:
    """The same where ``key`` of the config says so; see ``Module``."""
    return tuple(replace(module, when=key) for module in modules)


def biased(*modules: Module) -> tuple[Module, ...]:
    """The same with biases."""
    return tuple(replace(module, bias=True) for module in modules)


def plus_one(modules: tuple[Module, ...]) -> tuple[Module, ...]:
    """The same with Gemma's norms, which are all that has one dimension."""
    return tuple(
        module if " " in module.shape else replace(module, transform=transforms.plus_one)
        for module in modules
    )
