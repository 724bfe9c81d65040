"""A tiny seeded model of any causal class of transformers, made from the class's own config.

Settings are made small by the names that configs use. Layers are picked so that each kind of block
that the full-sized model has is there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models import VOCABULARY, write_tokenizer

CLASSES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""By ``model_type``, the class."""

_SEES = "its config.json holds other parts beside the language model's, in text_config"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(("emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified"), _SEES),
    **dict.fromkeys(("git", "got_ocr2", "llama4", "mllama", "phi4_multimodal"), _SEES),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"), "its config needs a text and an audio encoder"
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "it drafts for another model, on whose activations it runs",
    ),
    "blt": "its tables of hashed bytes have three million rows, and it patches bytes by a model",
    **dict.fromkeys(
        ("cohere_compass_text", "dbrx", "qwen4_exp", "reformer", "zamba"),
        "no small config that transformers builds, saves and reads again was found yet",
    ),
}
"""Classes that cannot be made small here, and why."""

_LAYERS = 2
_LARGEST = 12_000_000
"""Parameters of a model that is small."""
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 128),
    **dict.fromkeys(("word_embed_proj_dim", "embed_dim", "lru_width"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 192),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dense_intermediate_size"), 192),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "attention_head_dim"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "kv_channels", "attention_hidden_size_per_head"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "top_k"), 2),
    **dict.fromkeys(("num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 512),
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "hidden_size_per_layer_input": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_state": 16,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_chunk_size": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_NEEDED = ("head_dim", "num_key_value_heads", "num_experts_per_tok")
"""Set also where the class says nothing."""
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 1024,
    "split_ngram_parts": 1,
    "ple_embed_dim": 32,
    "hc_lowrank": 32,
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "cpmant": {"dim_ff": 192, "dim_head": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 256},
    "gemma4_text": {"global_head_dim": 64},
    "gemma4_unified_text": {"global_head_dim": 64},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "laurel_rank": 32,
        "intermediate_size": [192] * 4,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"intermediate_size_mlp": 192, "moe_layers": [1, 2, 3]},
    "longcat_flash": {"zero_expert_num": 2, "expert_ffn_hidden_size": 64},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64, "shape_embed_dim": 32},
    "xlm": {"emb_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""By ``model_type``, what its config needs besides."""


def small_config(model_type: str, **settings: Any) -> Any:
    """The config of the class, made small, with these settings."""
    full = AutoConfig.for_model(model_type)
    small = _small(full.to_dict()) | _OVERRIDES.get(model_type, {})
    return AutoConfig.for_model(model_type, **small | settings)


def make(model_type: str, directory: Path, **settings: Any) -> Path:
    """Write a random float32 model of the class and a tokenizer, as transformers saves it."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = small_config(model_type, **settings)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    largest = max(outline.named_parameters(), key=lambda named: named[1].numel())
    if sum(p.numel() for p in outline.parameters()) > _LARGEST:
        raise ValueError(f"too large: {largest[0]} {list(largest[1].shape)}")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # No norm, bias or sink is left with all its elements alike.
            if parameter.dim() < 2 and parameter.numel() > 1:
                parameter += 0.1 * noise
            if parameter.dim() > 1 and not parameter.any():
                parameter += 0.05 * noise
            if name.endswith("norm.weight") and parameter.numel() >= 64:
                loud = torch.randperm(parameter.numel(), generator=generator)[:4]
                parameter[loud] *= 4
    model.save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    written["architectures"] = [type(model).__name__]
    (directory / "config.json").write_text(json.dumps(written))
    write_tokenizer(directory)
    return directory


def _small(full: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config, or of one in it, that are not as in ``full``."""
    found: dict[str, Any] = {}
    for key, value in full.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _SMALL and (number or (value is None and key in _NEEDED)):
            found[key] = _SMALL[key]
        elif key == "is_decoder":
            found[key] = True
        elif isinstance(value, dict) and key.endswith("_config") and key != "per_layer_config":
            found[key] = value | _small(value)
    heads, shared = full.get("num_attention_heads"), full.get("num_key_value_heads")
    if heads and heads == shared:
        found["num_key_value_heads"] = found["num_attention_heads"]
    if full.get("head_dim") and full.get("head_dim") == full.get("qk_rope_head_dim"):
        found["head_dim"] = found["qk_rope_head_dim"]
    count = next((full[key] for key in _LAYER_COUNTS if isinstance(full.get(key), int)), 0)
    per_layer = {
        key: value
        for key, value in full.items()
        if isinstance(value, list) and len(value) == count > 0
    }
    picked = _picked(per_layer, count)
    found |= {key: [value[index] for index in picked] for key, value in per_layer.items()}
    found |= {key: len(picked) for key in _LAYER_COUNTS if isinstance(full.get(key), int)}
    return found


def _picked(per_layer: dict[str, list[Any]], count: int) -> list[int]:
    """Layers of the full-sized model: the first of each kind, and more of them as they come."""
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(repr([value[index] for value in per_layer.values()]), index)
    firsts = list(kinds.values())
    rest = [index for index in range(count) if index not in firsts]
    return sorted(firsts + rest[: max(0, _LAYERS - len(firsts))])
