"""Families whose blocks are of two kinds: some attend, the others are recurrent or convolve."""

from __future__ import annotations

from dataclasses import replace

from quantkit.formats.gguf.architectures import metadata as keys
from quantkit.formats.gguf.architectures import transforms
from quantkit.formats.gguf.architectures.architecture import Architecture, Module
from quantkit.formats.gguf.architectures.limits import SILU
from quantkit.formats.gguf.architectures.modules import (
    EMBEDDING,
    HEAD,
    HEAD_NORMS,
    OUTER,
    POST_NORMS,
    attention,
    gated,
    plus_one,
    router,
    stacked_experts,
    when,
)

_GATED_ATTENTION = (
    replace(attention()[0], shape="2*q hidden_size"),
    *attention()[1:],
    *plus_one(HEAD_NORMS),
)
_DELTA = (
    Module(
        "linear_attn.in_proj_qkv", "attn_qkv", "linear_qkv hidden_size", transforms.tile_after_keys
    ),
    Module("linear_attn.in_proj_z", "attn_gate", "linear_v hidden_size", transforms.tile),
    Module(
        "linear_attn.in_proj_b",
        "ssm_beta",
        "linear_num_value_heads hidden_size",
        transforms.tile,
    ),
    Module(
        "linear_attn.in_proj_a",
        "ssm_alpha",
        "linear_num_value_heads hidden_size",
        transforms.tile,
    ),
    Module(
        "linear_attn.conv1d",
        "ssm_conv1d",
        "linear_qkv 1 linear_conv_kernel_dim",
        transforms.tiled_kernel,
    ),
    Module("linear_attn.norm", "ssm_norm", "linear_value_head_dim"),
    Module("linear_attn.out_proj", "ssm_out", "hidden_size linear_v", transforms.tile_columns),
    Module(
        "linear_attn.dt_bias",
        "ssm_dt.bias",
        "linear_num_value_heads",
        transforms.tile,
        alone=True,
    ),
    Module(
        "linear_attn.A_log",
        "ssm_a",
        "linear_num_value_heads",
        transforms.tiled_decay,
        alone=True,
    ),
)
QWEN35 = Architecture(
    "qwen35",
    plus_one(OUTER),
    (
        *plus_one(POST_NORMS),
        *when("!recurrent", _GATED_ATTENTION),
        *when("recurrent", _DELTA),
        *gated(),
    ),
    keys.USUAL.replace("rope_freq_base ", "rope_dimension_sections rope_freq_base ")
    + "expert_feed_forward_length expert_shared_feed_forward_length ssm_conv_kernel "
    "ssm_state_size ssm_group_count ssm_time_step_rank ssm_inner_size recurrent_layers "
    "full_attention_interval rope_dimension_count",
    values=keys.qwen35_values,
    computes=SILU | {"attention_bias": False},
    ignored=("mtp.*",),
)
QWEN35_MOE = replace(
    QWEN35,
    name="qwen35moe",
    block=(
        *QWEN35.block[: -len(gated())],
        router("mlp.gate"),
        *gated("mlp.experts.*.", "_exps", "moe_intermediate_size", when="!stacked"),
        *stacked_experts("mlp.experts."),
        *gated("mlp.shared_expert.", "_shexp", "shared_expert_intermediate_size"),
        Module("mlp.shared_expert_gate", "ffn_gate_inp_shexp", "1 hidden_size"),
    ),
)
LFM2 = Architecture(
    "lfm2",
    (EMBEDDING, Module("model.embedding_norm", "token_embd_norm", "hidden_size"), HEAD),
    (
        Module("operator_norm", "attn_norm", "hidden_size"),
        Module("ffn_norm", "ffn_norm", "hidden_size"),
        *when(
            "!recurrent",
            (
                *attention()[:-1],
                Module("self_attn.out_proj", "attn_output", "hidden_size q"),
                Module("self_attn.q_layernorm", "attn_q_norm", "head_size"),
                Module("self_attn.k_layernorm", "attn_k_norm", "head_size"),
            ),
        ),
        *when(
            "recurrent",
            (
                Module("conv.in_proj", "shortconv.in_proj", "3*hidden_size hidden_size"),
                Module(
                    "conv.conv",
                    "shortconv.conv",
                    "hidden_size 1 conv_L_cache",
                    transforms.kernel,
                ),
                Module("conv.out_proj", "shortconv.out_proj", "hidden_size hidden_size"),
            ),
        ),
        *gated("feed_forward.", parts={"w1": "gate", "w2": "down", "w3": "up"}),
    ),
    keys.USUAL + "vocab_size shortconv_l_cache",
    values=keys.lfm2_values,
    computes={"conv_bias": False},
)
