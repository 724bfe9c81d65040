"""The families that quantkit converts: their modules, their metadata, what llama.cpp computes."""

from __future__ import annotations

from dataclasses import replace

from quantkit.formats.gguf.architectures import limits
from quantkit.formats.gguf.architectures import metadata as keys
from quantkit.formats.gguf.architectures.architecture import Architecture, Module
from quantkit.formats.gguf.architectures.hybrids import LFM2, QWEN35, QWEN35_MOE
from quantkit.formats.gguf.architectures.limits import GELU, SCALED, SILU, UNTIED
from quantkit.formats.gguf.architectures.modules import (
    EMBEDDING,
    GATED_AS_ONE,
    HEAD,
    HEAD_NORMS,
    NORM,
    NORMS,
    OUTER,
    POST_NORMS,
    attention,
    biased,
    gated,
    interleaved,
    plus_one,
    router,
    turned_experts,
)
from quantkit.formats.gguf.architectures.transforms import (
    latent_keys,
    latent_values,
    transpose,
    ungroup_heads,
)

_LLAMA = Architecture(
    "llama",
    OUTER,
    NORMS + interleaved(attention("attention_bias", "attention_bias")) + gated(bias="mlp_bias"),
    keys.USUAL + "vocab_size rope_dimension_count",
    values=keys.llama_values,
    computes=SILU,
    rope_types=(*SCALED, "llama3"),
)
_MIXTRAL = replace(
    _LLAMA,
    block=(
        *NORMS,
        *interleaved(attention()),
        router("block_sparse_moe.gate"),
        *gated(
            "block_sparse_moe.experts.*.", "_exps", parts={"w1": "gate", "w2": "down", "w3": "up"}
        ),
    ),
)
_GRANITE = replace(
    _LLAMA,
    name="granite",
    keys=_LLAMA.keys + " attention_scale embedding_scale residual_scale logit_scale",
    values=keys.granite_values,
    computes=SILU | {"head_dim": lambda c: (None, c["hidden_size"] // c["num_attention_heads"])},
)
_SMOLLM3 = replace(
    _LLAMA,
    name="smollm3",
    block=NORMS + interleaved(attention()) + gated(),
    computes=SILU
    | {
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "no_rope_layers": lambda c: [int(n % 4 != 3) for n in range(c["num_hidden_layers"])],
    },
    rope_types=SCALED,
)
_MINISTRAL3 = replace(
    _LLAMA,
    name="mistral3",
    block=NORMS + interleaved(attention()) + gated(),
    keys=_LLAMA.keys + " rope_scaling_yarn_log_mul attn_temperature_scale",
    values=keys.ministral3_values,
    computes=SILU | {"sliding_window": None},
    rope_types=("yarn",),
)
_SEED_OSS = Architecture(
    "seed_oss",
    OUTER,
    (
        *POST_NORMS,
        *attention("attention_bias"),
        *gated(),
    ),
    keys.USUAL,
    computes=SILU | {"attention_out_bias": False, "mlp_bias": False},
    rope_types=SCALED,
)
_QWEN2 = Architecture(
    "qwen2",
    OUTER,
    NORMS + attention(bias=True) + gated(),
    keys.USUAL,
    computes=SILU,
    rope_types=SCALED,
)
_QWEN3 = replace(
    _QWEN2,
    name="qwen3",
    block=NORMS + attention() + HEAD_NORMS + gated(),
    computes=SILU | {"attention_bias": False},
)
_QWEN3_MOE = replace(
    _QWEN3,
    name="qwen3moe",
    block=(
        *NORMS,
        *attention(),
        *HEAD_NORMS,
        router("mlp.gate"),
        *gated("mlp.experts.*.", "_exps", "moe_intermediate_size"),
    ),
    keys=keys.USUAL + "expert_feed_forward_length",
    computes={
        **_QWEN3.computes,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
)
_GEMMA_NORMS = (
    Module("input_layernorm", "attn_norm", "hidden_size"),
    Module("post_attention_layernorm", "post_attention_norm", "hidden_size"),
    Module("pre_feedforward_layernorm", "ffn_norm", "hidden_size"),
    Module("post_feedforward_layernorm", "post_ffw_norm", "hidden_size"),
)
_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "use_bidirectional_attention": (None, False)}
_GEMMA2 = Architecture(
    "gemma2",
    plus_one((EMBEDDING, NORM)),
    plus_one(_GEMMA_NORMS) + attention() + gated(),
    "context_length embedding_length block_count feed_forward_length head_count head_count_kv "
    "layer_norm_rms_eps key_length value_length file_type attn_logit_softcapping "
    "final_logit_softcapping sliding_window rope_freq_base",
    values=keys.unusual_rope_values,
    computes=_GEMMA
    | {
        "tie_word_embeddings": True,
        "attn_logit_softcapping": lambda c: c["attn_logit_softcapping"] or 50.0,
        "final_logit_softcapping": lambda c: c["final_logit_softcapping"] or 30.0,
        "query_pre_attn_scalar": lambda c: limits.gemma_scalar(c, 46),
        "layer_types": lambda c: limits.windows(c, 2),
    },
    ignored=("*lm_head.weight",),
    sliding_window=True,
)
_GEMMA3 = Architecture(
    "gemma3",
    plus_one(OUTER),
    plus_one(_GEMMA_NORMS + HEAD_NORMS) + attention() + gated(),
    keys.USUAL + "final_logit_softcapping sliding_window",
    values=keys.gemma3_values,
    computes=_GEMMA
    | {
        "attn_logit_softcapping": None,
        "query_pre_attn_scalar": lambda c: limits.gemma_scalar(c, 62),
        "layer_types": lambda c: limits.windows(
            c, 1 if c.get("sliding_window_pattern") == 1 else 6
        ),
    },
    rope_types=SCALED,
    sliding_window=True,
)
_PHI3 = Architecture(
    "phi3",
    OUTER,
    (
        *NORMS,
        Module("self_attn.qkv_proj", "attn_qkv", "qkv hidden_size"),
        Module("self_attn.o_proj", "attn_output", "hidden_size q"),
        *GATED_AS_ONE,
    ),
    "rope_scaling_attn_factors context_length rope_scaling_orig_ctx_len embedding_length "
    "feed_forward_length block_count head_count head_count_kv layer_norm_rms_eps "
    "rope_dimension_count rope_freq_base file_type sliding_window",
    values=keys.phi3_values,
    computes=SILU,
    rope_types=("default", "longrope"),
)
_ERNIE = Architecture(
    "ernie4_5",
    OUTER,
    NORMS + attention() + gated(),
    keys.USUAL,
    computes=SILU | {"use_bias": False},
    rope_types=SCALED,
)
_GLM4 = Architecture(
    "glm4",
    OUTER,
    (
        Module("input_layernorm", "attn_norm", "hidden_size"),
        Module("post_self_attn_layernorm", "post_attention_norm", "hidden_size"),
        Module("post_attention_layernorm", "ffn_norm", "hidden_size"),
        Module("post_mlp_layernorm", "post_ffw_norm", "hidden_size"),
        *attention("attention_bias"),
        *GATED_AS_ONE,
    ),
    keys.USUAL + "rope_dimension_count",
    computes=SILU,
)
_OLMO2 = Architecture(
    "olmo2",
    OUTER,
    (
        Module("post_attention_layernorm", "post_attention_norm", "hidden_size"),
        Module("post_feedforward_layernorm", "post_ffw_norm", "hidden_size"),
        Module("self_attn.q_norm", "attn_q_norm", "q"),
        Module("self_attn.k_norm", "attn_k_norm", "kv"),
        *attention(),
        *gated(),
    ),
    keys.USUAL,
    computes=SILU | UNTIED,
    rope_types=SCALED,
)
_GPT_OSS = Architecture(
    "gpt-oss",
    OUTER,
    (
        *POST_NORMS,
        *attention(bias=True, output_bias=True),
        Module("self_attn.sinks", "attn_sinks.weight", "num_attention_heads", alone=True),
        *biased(router("mlp.router")),
        *turned_experts("mlp.experts."),
    ),
    keys.USUAL + "sliding_window expert_feed_forward_length",
    values=lambda c: {"expert_feed_forward_length": c["intermediate_size"]},
    computes=SILU
    | {
        "attention_bias": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "layer_types": lambda c: limits.windows(c, 2),
    },
    rope_types=SCALED,
    sliding_window=True,
)
_OLMO3 = replace(
    _OLMO2,
    keys=keys.USUAL + "sliding_window sliding_window_pattern",
    values=keys.olmo3_values,
    sliding_window=True,
)
_GPT2 = Architecture(
    "gpt2",
    (
        Module("transformer.wte", "token_embd", "vocab_size hidden_size"),
        Module("transformer.wpe", "position_embd", "max_position_embeddings hidden_size"),
        Module("transformer.ln_f", "output_norm", "hidden_size", bias=True),
        HEAD,
    ),
    biased(
        Module("ln_1", "attn_norm", "hidden_size"),
        Module("attn.c_attn", "attn_qkv", "hidden_size 3*hidden_size", transpose),
        Module("attn.c_proj", "attn_output", "hidden_size hidden_size", transpose),
        Module("ln_2", "ffn_norm", "hidden_size"),
        Module("mlp.c_fc", "ffn_up", "hidden_size 4*hidden_size", transpose),
        Module("mlp.c_proj", "ffn_down", "4*hidden_size hidden_size", transpose),
    ),
    "block_count context_length embedding_length feed_forward_length head_count layer_norm_eps "
    "file_type",
    blocks="transformer.h.",
    computes=GELU
    | {
        "intermediate_size": lambda c: 4 * c["hidden_size"],
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
)
_GPTNEOX = Architecture(
    "gptneox",
    (
        Module("gpt_neox.embed_in", "token_embd", "vocab_size hidden_size"),
        Module("gpt_neox.final_layer_norm", "output_norm", "hidden_size", bias=True),
        Module("embed_out", "output", "vocab_size hidden_size"),
    ),
    biased(
        *NORMS,
        Module("attention.query_key_value", "attn_qkv", "3*hidden_size hidden_size", ungroup_heads),
        Module("attention.dense", "attn_output", "hidden_size hidden_size"),
        Module("mlp.dense_h_to_4h", "ffn_up", "intermediate_size hidden_size"),
        Module("mlp.dense_4h_to_h", "ffn_down", "hidden_size intermediate_size"),
    ),
    # Without a file type, which llama.cpp's converter forgets here.
    "context_length embedding_length block_count feed_forward_length rope_dimension_count "
    "head_count parallel_residual layer_norm_eps rope_freq_base",
    blocks="gpt_neox.layers.",
    values=keys.unusual_rope_values,
    computes=GELU | UNTIED | {"attention_bias": True},
)
_STABLELM = Architecture(
    "stablelm",
    (EMBEDDING, *biased(NORM), HEAD),
    (
        *biased(NORMS[0], replace(NORMS[1], when="!use_parallel_residual")),
        *attention("use_qkv_bias"),
        Module(
            "self_attn.q_layernorm.norms.*",
            "attn_q_norm",
            "num_attention_heads head_size",
            when="qk_layernorm",
        ),
        Module(
            "self_attn.k_layernorm.norms.*",
            "attn_k_norm",
            "num_key_value_heads head_size",
            when="qk_layernorm",
        ),
        *gated(),
    ),
    "context_length embedding_length block_count feed_forward_length rope_dimension_count "
    "head_count head_count_kv parallel_residual layer_norm_eps file_type "
    "rope_freq_base",
    values=keys.unusual_rope_values,
    computes=SILU | UNTIED,
)
_DEEPSEEK2 = Architecture(
    "deepseek2",
    (EMBEDDING, NORM, replace(HEAD, when="!tie_word_embeddings")),
    (
        *NORMS,
        Module("self_attn.q_proj", "attn_q", "q hidden_size", when="!q_lora_rank"),
        Module("self_attn.q_a_proj", "attn_q_a", "q_lora_rank hidden_size", when="q_lora_rank"),
        Module("self_attn.q_a_layernorm", "attn_q_a_norm", "q_lora_rank", when="q_lora_rank"),
        Module("self_attn.q_b_proj", "attn_q_b", "q q_lora_rank", when="q_lora_rank"),
        Module("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", "kv_a hidden_size"),
        Module("self_attn.kv_a_layernorm", "attn_kv_a_norm", "kv_lora_rank"),
        Module("self_attn.kv_b_proj", "attn_k_b", "kv_b kv_lora_rank", latent_keys),
        Module("self_attn.kv_b_proj", "attn_v_b", "kv_b kv_lora_rank", latent_values),
        Module("self_attn.o_proj", "attn_output", "hidden_size v"),
        *gated(when="!sparse"),
        router("mlp.gate", when="sparse"),
        *gated("mlp.experts.*.", "_exps", "moe_intermediate_size", when="sparse"),
        *gated(
            "mlp.shared_experts.", "_shexp", "n_shared_experts*moe_intermediate_size", when="sparse"
        ),
    ),
    keys.USUAL + "leading_dense_block_count vocab_size q_lora_rank kv_lora_rank key_length_mla "
    "value_length_mla expert_feed_forward_length expert_shared_count expert_weights_scale "
    "rope_dimension_count rope_scaling_yarn_log_mul",
    values=keys.deepseek2_values,
    computes=SILU
    | {
        "num_key_value_heads": lambda c: c["num_attention_heads"],
        "n_group": (None, 1),
        "scoring_func": "softmax",
        "norm_topk_prob": (None, False),
        "moe_layer_freq": 1,
        "q_lora_rank": limits.deepseek2_queries,
    },
    rope_types=("default", "yarn"),
    ignored=("*lm_head.weight",),
)

SUPPORTED = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _MIXTRAL,
    "Ministral3ForCausalLM": _MINISTRAL3,
    "SmolLM3ForCausalLM": _SMOLLM3,
    "SeedOssForCausalLM": _SEED_OSS,
    "GraniteForCausalLM": _GRANITE,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen3MoeForCausalLM": _QWEN3_MOE,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    "Phi3ForCausalLM": _PHI3,
    "Olmo2ForCausalLM": _OLMO2,
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoXForCausalLM": _GPTNEOX,
    "StableLmForCausalLM": _STABLELM,
    "DeepseekV2ForCausalLM": _DEEPSEEK2,
    "Olmo3ForCausalLM": _OLMO3,
    "Ernie4_5ForCausalLM": _ERNIE,
    "Glm4ForCausalLM": _GLM4,
    "GptOssForCausalLM": _GPT_OSS,
    "Lfm2ForCausalLM": LFM2,
    "Qwen3_5ForCausalLM": QWEN35,
    "Qwen3_5ForConditionalGeneration": QWEN35,
    "Qwen3_5MoeForCausalLM": QWEN35_MOE,
    "Qwen3_5MoeForConditionalGeneration": QWEN35_MOE,
}
"""By transformers' names."""
