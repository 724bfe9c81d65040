"""What quantkit does not convert to GGUF: llama.cpp would compute another model."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from quantkit.errors import ConversionError
from quantkit.formats.gguf import architectures

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LATENT = {"num_key_value_heads": 32, "num_hidden_layers": 4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 48,
    "long_factor": [1.0] * 48,
    "original_max_position_embeddings": 1024,
}


@pytest.mark.parametrize(
    ("family", "name", "config", "message"),
    [
        ("llama", "Llama", {"rope_parameters": {**YARN, "attention_factor": 1.0}}, "attention_fac"),
        ("llama", "Llama", {"rope_parameters": {**YARN, "truncate": False}}, "truncate False"),
        ("llama", "Llama", {"rope_parameters": {**LONGROPE, "factor": 2.0}}, "'longrope' has no"),
        (
            "qwen2",
            "Qwen2",
            {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
            "mscale 1.0",
        ),
        ("qwen3", "Qwen3", {"attention_bias": True}, "qwen3 with False only"),
        (
            "qwen3_moe",
            "Qwen3Moe",
            {},
            "norm_topk_prob False: llama.cpp computes qwen3moe with True",
        ),
        (
            "qwen3_moe",
            "Qwen3Moe",
            {"norm_topk_prob": True, "mlp_only_layers": [3]},
            "mlp_only_layers .3.",
        ),
        (
            "qwen3_moe",
            "Qwen3Moe",
            {"norm_topk_prob": True, "decoder_sparse_step": 2},
            "decoder_sparse_step",
        ),
        ("granite", "Granite", {"head_dim": 64}, "head_dim 64: .* with None or 128"),
        ("gemma2", "Gemma2", {"query_pre_attn_scalar": 224}, "scalar 224: .* with 256 only"),
        ("gemma2", "Gemma2", {"num_hidden_layers": 46}, "scalar 256: .* with 288 only"),
        ("gemma2", "Gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
        ("gemma2", "Gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ("gemma2", "Gemma2", {"rope_parameters": YARN}, "rope_type 'yarn' has no"),
        (
            "gemma3_text",
            "Gemma3",
            {"layer_types": ["full_attention"] * 26},
            "layer_types .*\\.\\.\\.",
        ),
        ("gemma3_text", "Gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
        ("phi3", "Phi3", {"rope_parameters": {**LONGROPE, "factor": 2.0}}, "factor 2.0"),
        (
            "phi3",
            "Phi3",
            {"rope_parameters": {**LONGROPE, "attention_factor": 3.0}},
            "attention_factor 3.0",
        ),
        ("olmo2", "Olmo2", {"tie_word_embeddings": True}, "olmo2 with False only"),
        ("gpt2", "GPT2", {"n_inner": 100}, "intermediate_size 100: .* with 3072 only"),
        ("gpt2", "GPT2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx True"),
        ("gpt_neox", "GPTNeoX", {"attention_bias": False}, "attention_bias False"),
        ("stablelm", "StableLm", {"rope_parameters": YARN}, "rope_type 'yarn' has no"),
        ("deepseek_v2", "DeepseekV2", {**LATENT, "q_lora_rank": None}, "neither 26 nor 27"),
        ("deepseek_v2", "DeepseekV2", {**LATENT, "num_hidden_layers": 27}, "q_lora_rank 1536"),
        ("deepseek_v2", "DeepseekV2", {**LATENT, "n_group": 8}, "n_group 8"),
        ("deepseek_v2", "DeepseekV2", {**LATENT, "norm_topk_prob": True}, "norm_topk_prob True"),
        ("deepseek_v2", "DeepseekV2", {**LATENT, "rope_parameters": YARN}, "mscale None"),
        (
            "deepseek_v2",
            "DeepseekV2",
            {**LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
            "mscale 1.0",
        ),
    ],
)
def test_another_model_than_llama_cpp_computes_is_refused(
    family: str, name: str, config: dict[str, Any], message: str
) -> None:
    """llama.cpp does not load what its converter makes of these, or gives other logits than
    transformers does."""
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    settings = AutoConfig.for_model(family, **config).to_dict()
    with pytest.raises(ConversionError, match=message):
        architectures.check_config(settings | {"architectures": [name + suffix]})


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_neox", "phi3"])
def test_what_a_family_is_by_default_is_not_refused(family: str) -> None:
    names = {"llama": "Llama", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "gpt_neox": "GPTNeoX"}
    name = f"{names.get(family, 'Phi3')}ForCausalLM"
    architectures.check_config(AutoConfig.for_model(family).to_dict() | {"architectures": [name]})
