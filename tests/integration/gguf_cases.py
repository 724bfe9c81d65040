"""Tiny models of every architecture, as transformers 4 and 5 and their authors save them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models import make_checkpoint

COMMON: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "pad_token_id": None,
    "initializer_range": 0.1,
}
UNTIED = {"tie_word_embeddings": False}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
MINISTRAL = {
    **YARN,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA_3 = {**GEMMA, "num_hidden_layers": 7, "initializer_range": 0.05}
GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
QWEN_MOE = {
    "head_dim": 32,
    "num_experts": 11,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
DEEPSEEK = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
DEEPSEEK_LITE = {
    **DEEPSEEK,
    "num_hidden_layers": 27,  # by which llama.cpp knows it
    "initializer_range": 0.05,
    "q_lora_rank": None,
    "scoring_func": "softmax",
    "moe_layer_freq": 1,
}
DEEPSEEK_YARN = {
    **YARN,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


def longrope(channels: int, trained: int, **parameters: Any) -> dict[str, Any]:
    """Settings of a Phi-3 with so many rotating channels, trained on so many tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1 + i / 8 for i in range(channels // 2)],
        "long_factor": [1.5 + i for i in range(channels // 2)],
        "original_max_position_embeddings": trained,
        **parameters,
    }
    return {"rope_parameters": rope, "original_max_position_embeddings": trained}


def partial(factor: float) -> dict[str, Any]:
    """Settings of a model of whose heads a part rotates."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor}
    return {"rope_parameters": rope}


def by_transformers_4(directory: Path) -> None:
    """Rewrite config.json with the keys that transformers 4 wrote."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    if local := rope.get("sliding_attention"):
        config["rope_local_base_freq"] = local["rope_theta"]
        config["sliding_window_pattern"] = 6
        del config["layer_types"]
        rope = rope["full_attention"]
    neox = config["model_type"] == "gpt_neox"
    config["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop(
            "partial_rotary_factor"
        )
    if config["model_type"] == "phi3":  # which has it beside the others too
        rope.pop("original_max_position_embeddings", None)
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    path.write_text(json.dumps(config))


def by_openai(directory: Path) -> None:
    """GPT-2 as OpenAI's is on the hub: names without a prefix, causal masks, ``n_ctx``."""
    file = directory / "model.safetensors"
    state = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    masks = {f"h.{block}.attn.bias": torch.ones(1, 1, 64, 64).tril() for block in range(3)}
    save_file(state | masks, file)


def with_rotary_buffers(directory: Path) -> None:
    """GPT-NeoX as old versions of transformers saved it."""
    file = directory / "model.safetensors"
    place = "gpt_neox.layers.1.attention"
    buffers = {
        f"{place}.bias": torch.ones(1, 1, 64, 64).tril(),
        f"{place}.masked_bias": torch.tensor(-1e9),
        f"{place}.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file(load_file(file) | buffers, file)
    by_transformers_4(directory)


def with_its_head(directory: Path) -> None:
    """The output layer stored although it is tied to the embedding."""
    file = directory / "model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file)


def as_a_part(directory: Path) -> None:
    """A model that also sees: its language model and a piece of the rest, and a draft's block."""
    file, config = directory / "model.safetensors", directory / "config.json"
    state = {
        name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1): t
        for name, t in load_file(file).items()
    }
    beside = ("model.visual.blocks.0.norm1.weight", "mtp.norm.weight")
    save_file(state | {name: torch.ones(8) for name in beside}, file)
    text = json.loads(config.read_text())
    whole = {
        "architectures": [
            name.replace("ForCausalLM", "ForConditionalGeneration")
            for name in text.pop("architectures")
        ],
        "model_type": text["model_type"].removesuffix("_text"),
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": text["dtype"],
        "text_config": text,
    }
    config.write_text(json.dumps(whole))


def as_qwen_does(directory: Path) -> None:
    """The same with all experts of a block in one tensor."""
    file = directory / "model.safetensors"
    state = load_file(file)
    for block in range(3):
        place = f"model.layers.{block}.mlp.experts."
        gates, ups, downs = (
            torch.stack([state.pop(f"{place}{i}.{part}_proj.weight") for i in range(5)])
            for part in ("gate", "up", "down")
        )
        state[f"{place}gate_up_proj"] = torch.cat([gates, ups], 1)
        state[f"{place}down_proj"] = downs
    save_file(state, file)
    as_a_part(directory)


@dataclass(frozen=True)
class Case:
    """A tiny model; ``edit`` changes what transformers wrote. ``tolerance``: of log
    probabilities in nats, between llama.cpp and transformers."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    scheme: str = "BF16"
    shards: int = 1
    edit: Callable[[Path], None] | None = None
    tolerance: float = 1e-3


F16, F32 = torch.float16, torch.float32
CASES = {
    "llama-2": Case("llama", UNTIED, F16, "F16", edit=by_transformers_4),
    "llama-3.1": Case("llama", {"rope_parameters": LLAMA_3}, shards=3),
    "llama-3.2": Case("llama", {"rope_parameters": LLAMA_3}, edit=by_transformers_4),
    "llama-biases": Case(
        "llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR}, F32, "F32"
    ),
    "llama-f64": Case("llama", {}, torch.float64, "F16", edit=with_its_head),
    "falcon-3": Case("llama", {**UNTIED, "head_dim": 32}),
    "mistral": Case(
        "mistral", {**UNTIED, "head_dim": 32, "sliding_window": None, "rope_parameters": YARN}
    ),
    "mixtral": Case("mixtral", {**UNTIED, "num_local_experts": 5}, shards=3),
    "mixtral-f16": Case("mixtral", {"num_local_experts": 11}, F16, "F16", edit=by_transformers_4),
    "ministral-3": Case("ministral3", {**UNTIED, "head_dim": 32, "rope_parameters": MINISTRAL}),
    "ministral-3-tied": Case("ministral3", {"rope_parameters": MINISTRAL}, F16, "F16", shards=2),
    "smollm-3": Case("smollm3", {"num_hidden_layers": 5}, shards=2, edit=by_transformers_4),
    "smollm-3-yarn": Case("smollm3", {**UNTIED, "rope_parameters": YARN}, F32, "F16"),
    "seed-oss": Case("seed_oss", {**UNTIED, "head_dim": 32}),
    "seed-oss-plain": Case("seed_oss", {"attention_bias": False, "rope_parameters": YARN}, F16),
    "qwen2": Case("qwen2", {**UNTIED, "rope_parameters": YARN}, edit=by_transformers_4),
    "qwen2-tied": Case("qwen2", {}, F32, "F16", shards=2),
    "qwen3": Case("qwen3", {"head_dim": 32, "rope_parameters": LINEAR}),
    "qwen3-untied": Case("qwen3", {**UNTIED, "rope_parameters": YARN}, F16, "F32"),
    "qwen3-moe": Case("qwen3_moe", UNTIED | QWEN_MOE, shards=2, edit=by_transformers_4),
    "gemma-2": Case("gemma2", GEMMA, edit=with_its_head),
    # The converter adds 1 to a half in half precision: a rounding that transformers does not have.
    "gemma-2-f16": Case("gemma2", GEMMA, F16, "F16", 2, edit=by_transformers_4, tolerance=1e-2),
    "gemma-3": Case("gemma3_text", {**GEMMA_3, "final_logit_softcapping": 2.0}),
    "gemma-3-scaled": Case(
        "gemma3_text",
        {**GEMMA_3, **UNTIED, "rope_parameters": GEMMA_3_ROPE},
        F16,
        "BF16",
        3,
        edit=by_transformers_4,
        tolerance=1e-2,
    ),
    "phi-3": Case("phi3", {**UNTIED, "sliding_window": 2047}, F16, "F16", edit=by_transformers_4),
    "phi-3-128k": Case("phi3", UNTIED | longrope(16, 16), edit=by_transformers_4),
    "phi-4-mini": Case("phi3", longrope(12, 4096, partial_rotary_factor=0.75), shards=2),
    "gpt-2": Case("gpt2", {"n_ctx": 2048}, shards=2),
    "gpt-2-hub": Case("gpt2", {"n_ctx": 2048}, F32, "F16", edit=by_openai),
    "pythia": Case("gpt_neox", UNTIED | partial(0.25), F16, "F16", edit=with_rotary_buffers),
    "gpt-neox": Case("gpt_neox", UNTIED | partial(0.5) | {"use_parallel_residual": False}),
    "olmo-2": Case("olmo2", {**UNTIED, "rope_parameters": YARN}, F32, "BF16", shards=2),
    "granite-3": Case(
        "granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
        },
        edit=by_transformers_4,
    ),
    "granite-biases": Case("granite", {**UNTIED, "attention_bias": True, "mlp_bias": True}),
    "stablelm-2": Case(
        "stablelm", UNTIED | partial(0.25) | {"use_qkv_bias": True}, F16, edit=by_transformers_4
    ),
    "stablelm-2-12b": Case(
        "stablelm", {**UNTIED, "qk_layernorm": True, "use_parallel_residual": True}, shards=2
    ),
    "deepseek-v2-lite": Case(
        "deepseek_v2",
        {**DEEPSEEK_LITE, **UNTIED, "rope_parameters": DEEPSEEK_YARN},
        shards=2,
        edit=by_transformers_4,
    ),
    "deepseek-v2": Case(
        "deepseek_v2",
        {**DEEPSEEK, "q_lora_rank": 40, "routed_scaling_factor": 2.5},
        F16,
        "F16",
        edit=with_its_head,
    ),
}

DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "head_dim": 32,
    "num_hidden_layers": 5,
    "full_attention_interval": 2,
    "initializer_range": 0.1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
QWEN35_MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
CASES |= {
    "olmo-3": Case("olmo3", {**UNTIED, "num_hidden_layers": 5, "sliding_window": 16}, F16, "F16"),
    "ernie-4.5": Case("ernie4_5", {"head_dim": 32}, shards=2),
    "glm-4": Case("glm4", {**UNTIED, "head_dim": 32, "attention_bias": True} | partial(0.5)),
    "gpt-oss": Case(
        "gpt_oss",
        {
            **UNTIED,
            "head_dim": 32,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0},
        },
        shards=2,
    ),
    "lfm-2": Case(
        "lfm2",
        {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "qwen-3.5": Case("qwen3_5_text", UNTIED | DELTA, shards=2),
    "qwen-3.5-moe": Case(
        "qwen3_5_moe_text",
        DELTA | QWEN35_MOE,
        F16,
        "F16",
        tolerance=5e-2,  # as Gemma 2 in F16
    ),
    "qwen-3.5-seeing": Case("qwen3_5_text", {**UNTIED, **DELTA}, edit=as_a_part),
    "qwen-3.5-moe-hub": Case(
        "qwen3_5_moe_text",
        {**UNTIED, **DELTA, **QWEN35_MOE, "num_hidden_layers": 3},
        edit=as_qwen_does,
    ),
}

UNUSUAL_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
BEYOND = {
    "stablelm-base": Case("stablelm", UNTIED | UNUSUAL_ROPE),
    "gpt-neox-base": Case("gpt_neox", UNTIED | UNUSUAL_ROPE),
    "gemma-2-base": Case("gemma2", GEMMA | UNUSUAL_ROPE | {"initializer_range": 0.05}),
}
"""Where llama.cpp's converter forgets the base of the rotary embedding, and its file is wrong."""


def make(case: Case, directory: Path) -> Path:
    """Write the model of ``case``."""
    make_checkpoint(
        directory,
        family=case.family,
        dtype=case.dtype,
        shards=case.shards,
        random_vectors=True,
        **(COMMON | case.config),
    )
    if case.edit:
        case.edit(directory)
    return directory
