"""Which metadata a GGUF has, and from which keys of a configuration it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.formats.gguf.architectures.architecture import Architecture, Config
from quantkit.formats.gguf.architectures.rope import longrope_attention_factor

if TYPE_CHECKING:
    import gguf

_KEY_OF = {
    "attention_scale": "attention_multiplier",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "embedding_scale": "embedding_multiplier",
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_shared_count": "n_shared_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
    "expert_weights_scale": "routed_scaling_factor",
    "feed_forward_length": "intermediate_size",
    "file_type": "file_type",
    "final_logit_softcapping": "final_logit_softcapping",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
    "key_length": "head_dim",
    "kv_lora_rank": "kv_lora_rank",
    "layer_norm_eps": "layer_norm_eps",
    "layer_norm_rms_eps": "rms_norm_eps",
    "leading_dense_block_count": "first_k_dense_replace",
    "logit_scale": "logits_scaling",
    "parallel_residual": "use_parallel_residual",
    "q_lora_rank": "q_lora_rank",
    "residual_scale": "residual_multiplier",
    "rope_dimension_count": "rotary_size",
    "rope_freq_base": "rope_theta",
    "rope_freq_base_swa": "local_rope_theta",
    "shortconv_l_cache": "conv_L_cache",
    "sliding_window": "sliding_window",
    "ssm_conv_kernel": "linear_conv_kernel_dim",
    "ssm_group_count": "linear_num_key_heads",
    "ssm_inner_size": "linear_v",
    "ssm_state_size": "linear_key_head_dim",
    "ssm_time_step_rank": "linear_num_value_heads",
    "value_length": "head_dim",
    "value_length_mla": "v_head_dim",
    "vocab_size": "vocab_size",
}
"""From GGUFWriter's methods, without their ``add_``, to the keys of a ``Config``. What is not
here a ``Config`` has under the method's name, or only a family's ``values`` have it."""

_NOT_IN_GGUF = {"recurrent_layers": "attention.recurrent_layers"}
"""Lists for which only llama.cpp's own copy of ``gguf`` has a method, and their keys."""

_DEFAULT_ROPE_BASE = 10000.0

USUAL = (
    "block_count context_length embedding_length feed_forward_length head_count head_count_kv "
    "rope_scaling_type rope_scaling_factor rope_scaling_orig_ctx_len rope_scaling_yarn_ext_factor "
    "rope_scaling_yarn_attn_factor rope_scaling_yarn_beta_fast rope_scaling_yarn_beta_slow "
    "rope_freq_base rope_freq_base_swa layer_norm_rms_eps expert_count expert_used_count "
    "expert_group_count expert_group_used_count expert_gating_func key_length value_length "
    "file_type "
)
"""What llama.cpp's converter writes, in this order, unless a family differs."""


def add_keys(
    writer: gguf.GGUFWriter, architecture: Architecture, c: Config, file_type: int
) -> None:
    """Write all that the model has of the architecture's keys."""
    values = architecture.values(c) | {"file_type": file_type}
    for method in architecture.keys.split():
        value = values[method] if method in values else c.get(_KEY_OF.get(method, method))
        if value is None:
            continue
        if method in _NOT_IN_GGUF:
            writer.add_array(f"{architecture.name}.{_NOT_IN_GGUF[method]}", value)
        else:
            getattr(writer, f"add_{method}")(value)


def llama_values(c: Config) -> dict[str, Any]:
    """All of a head rotates, whatever ``partial_rotary_factor`` says."""
    return {"rope_dimension_count": c["head_size"]}


def ministral3_values(c: Config) -> dict[str, Any]:
    """Queries grow with their positions, beyond the context that was trained on."""
    return llama_values(c) | {
        "rope_scaling_yarn_log_mul": c["rope"]["mscale_all_dim"],
        "attn_temperature_scale": c["rope"]["llama_4_scaling_beta"],
    }


def granite_values(c: Config) -> dict[str, Any]:
    """llama.cpp's converter leaves out the size of a head."""
    return llama_values(c) | {"key_length": None, "value_length": None}


def unusual_rope_values(c: Config) -> dict[str, Any]:
    """Here llama.cpp's converter forgets the base, which is right only where it is llama.cpp's
    default; write it where it is not, and be equal elsewhere."""
    return {"rope_freq_base": None} if c["rope_theta"] == _DEFAULT_ROPE_BASE else {}


def gemma3_values(c: Config) -> dict[str, Any]:
    """No window where no block has one."""
    return {"sliding_window": None} if c.get("sliding_window_pattern") == 1 else {}


def phi3_values(c: Config) -> dict[str, Any]:
    """A window of 0 means none: llama.cpp tells Phi-4 by it."""
    longrope = c["rope"].get("rope_type") == "longrope"
    return {
        "rope_scaling_attn_factors": longrope_attention_factor(c) if longrope else None,
        "rope_scaling_orig_ctx_len": c["rope"]["original_max_position_embeddings"],
        "sliding_window": c.get("sliding_window") or 0,
    }


def deepseek2_values(c: Config) -> dict[str, Any]:
    """Latent attention as llama.cpp computes it: all heads share one key, which is the latent."""
    import gguf

    mscale = c["rope"].get("mscale_all_dim")
    softmax = c.get("scoring_func") == "softmax"
    return {
        "head_count_kv": 1,
        "key_length": c["kv_a"],
        "value_length": c["kv_lora_rank"],
        "key_length_mla": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
        "expert_gating_func": gguf.ExpertGatingFuncType.SOFTMAX if softmax else None,
        "rope_scaling_yarn_log_mul": None if mscale is None else 0.1 * mscale,
    }


def olmo3_values(c: Config) -> dict[str, Any]:
    """Which blocks have a window."""
    return {"sliding_window_pattern": [kind == "sliding_attention" for kind in c["layer_types"]]}


def qwen35_values(c: Config) -> dict[str, Any]:
    """Positions have four parts, of which a text moves the first three alike."""
    sections = c["rope"].get("mrope_section") or [11, 11, 10]
    return {
        "rope_dimension_sections": (*sections, 0, 0, 0, 0)[:4],
        "recurrent_layers": c["recurrent_layers"],
        "full_attention_interval": c.get("full_attention_interval", 4),
    }


def lfm2_values(c: Config) -> dict[str, Any]:
    """Blocks that convolve have no heads of keys and values."""
    heads = c["num_key_value_heads"]
    return {
        "head_count_kv": [0 if recurrent else heads for recurrent in c["recurrent_layers"]],
        "layer_norm_rms_eps": c["norm_eps"],
    }
