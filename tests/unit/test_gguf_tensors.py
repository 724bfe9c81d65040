"""Permutation, rotary factors and layout of tensors, against slow loops and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.gguf import GGUF, architectures
from quantkit.spec import Spec

Q8_0 = Spec("gguf", "Q8_0")


def edited(
    tiny: Path, out: Path, tensors: dict[str, Any] | None = None, **config: Any
) -> Checkpoint:
    """A copy of a tiny checkpoint with other tensors (None: removed) and other config values."""
    shutil.copytree(tiny, out)
    settings = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(settings))
    if tensors:
        state = load_file(out / "model.safetensors") | tensors
        save_file({k: v for k, v in state.items() if v is not None}, out / "model.safetensors")
    return Checkpoint.open(out)


def test_interleave_puts_each_heads_halves_side_by_side() -> None:
    heads, dim, columns = 3, 8, 5
    rows = torch.randn(heads * dim, columns)
    slow = torch.empty_like(rows)
    for head in range(heads):
        for pair in range(dim // 2):
            slow[head * dim + 2 * pair] = rows[head * dim + pair]
            slow[head * dim + 2 * pair + 1] = rows[head * dim + dim // 2 + pair]
    assert torch.equal(architectures.interleave(rows, heads), slow)
    assert torch.equal(architectures.interleave(rows[:, 0], heads), slow[:, 0])


def test_llama_3_factors_are_those_of_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=2048, num_attention_heads=32, head_dim=64, rope_parameters=rope
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = architectures.rope_factors(config.to_dict())
    assert factors[0] == 1.0
    assert factors[-1] == 32.0
    assert torch.allclose(plain / torch.tensor(factors), scaled, rtol=1e-5)


def test_no_factors_without_llama_3_scaling() -> None:
    assert architectures.rope_factors(LlamaConfig().to_dict()) == []


@pytest.mark.parametrize(
    ("tensors", "config", "error", "message"),
    [
        ({"model.norm.weight": None}, {}, CheckpointError, "model.norm.weight .256. is missing"),
        (
            {"model.layers.1.mlp.up_proj.weight": torch.zeros(512, 255)},
            {},
            CheckpointError,
            "up_proj.weight has shape .512, 255., config.json asks for .512, 256.",
        ),
        (
            {"model.layers.0.self_attn.q_norm.weight": torch.ones(64)},
            {},
            ConversionError,
            "q_norm.weight is not a tensor of LlamaForCausalLM",
        ),
        ({}, {"tie_word_embeddings": False}, CheckpointError, "lm_head.weight .1024, 256. is miss"),
        ({}, {"hidden_act": "gelu"}, ConversionError, "hidden_act 'gelu'"),
        (
            {},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            ConversionError,
            "rope_type 'dynamic' has no counterpart",
        ),
        ({}, {"architectures": ["MambaForCausalLM"]}, ConversionError, "convert_hf_to_gguf.py"),
        (
            {},
            {"quantization_config": {"quant_method": "gptq"}},
            ConversionError,
            "quantized already .gptq.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_the_plan(
    tiny_llama: Path,
    tmp_path: Path,
    tensors: dict[str, Any],
    config: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    checkpoint = edited(tiny_llama, tmp_path / "edited", tensors, **config)
    with pytest.raises(error, match=message):
        GGUF().plan(checkpoint, Q8_0)


def test_an_unsupported_architecture_names_those_that_are(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = edited(tiny_llama, tmp_path / "edited", architectures=["GemmaForCausalLM"])
    with pytest.raises(ConversionError, match="LlamaForCausalLM, MistralForCausalLM, Qwen2For"):
        GGUF().plan(checkpoint, Q8_0)


def test_a_stored_rotary_buffer_is_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    checkpoint = edited(tiny_llama, tmp_path / "edited", {name: torch.ones(32)})
    tensors = architectures.layout(checkpoint, checkpoint.hf_config.to_dict())
    assert len(tensors) == len(checkpoint.tensors) - 1


def test_float16_that_overflows_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    large = torch.full((512, 256), 1e5, dtype=torch.bfloat16)
    checkpoint = edited(
        tiny_llama, tmp_path / "edited", {"model.layers.0.mlp.up_proj.weight": large}
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match=r"blk.0.ffn_up.weight holds 9.98e\+04, .*use BF16"):
        GGUF().convert(checkpoint, Spec("gguf", "F16"), None, tmp_path / "out")
