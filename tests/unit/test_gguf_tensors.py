"""Transformations, rotary factors and layout of tensors, against slow loops and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.gguf import architectures
from quantkit.formats.gguf.architectures import transforms
from quantkit.formats.gguf.architectures.config import resolve
from quantkit.formats.gguf.architectures.rope import (
    llama3_factors,
    longrope_attention_factor,
    rope_tensors,
)
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.native_gguf import NativeGGUF
from tests.models import make_checkpoint

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
    config = {"num_attention_heads": heads, "num_key_value_heads": heads}
    for interleave in (transforms.interleave_queries, transforms.interleave_keys):
        assert torch.equal(interleave(rows, config), slow)
        assert torch.equal(interleave(rows[:, 0], config), slow[:, 0])


def test_ungroup_heads_puts_all_queries_before_all_keys_before_all_values() -> None:
    heads, dim, columns = 3, 4, 5
    rows = torch.randn(heads * 3 * dim, columns)
    slow = torch.empty_like(rows)
    for head in range(heads):
        for part in range(3):
            for channel in range(dim):
                target = (part * heads + head) * dim + channel
                slow[target] = rows[(head * 3 + part) * dim + channel]
    config = {"num_attention_heads": heads}
    assert torch.equal(transforms.ungroup_heads(rows, config), slow)
    assert torch.equal(transforms.ungroup_heads(rows[:, 0], config), slow[:, 0])


def test_latent_keys_and_values_do_what_the_whole_matrix_does() -> None:
    heads, nope, value, rank = 3, 4, 5, 6
    rows, latent, query = (
        torch.randn(heads * (nope + value), rank),
        torch.randn(rank),
        torch.randn(nope),
    )
    config = {"num_attention_heads": heads, "qk_nope_head_dim": nope, "v_head_dim": value}
    keys = transforms.latent_keys(rows, config)
    values = transforms.latent_values(rows, config)
    for head in range(heads):
        expanded = rows[head * (nope + value) : (head + 1) * (nope + value)] @ latent
        assert torch.allclose(keys[head] @ query @ latent, query @ expanded[:nope], atol=1e-5)
        assert torch.allclose(values[head] @ latent, expanded[nope:], atol=1e-5)


def test_gemmas_one_is_added_to_a_half_as_to_a_half() -> None:
    weight = torch.tensor([2.0**-12, -0.75])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = transforms.plus_one(weight.to(dtype), {}).float()
        # 1 + 2**-12 needs more than the ten bits behind the point that a half has.
        first = 1.0 if dtype == torch.float16 else 1 + 2.0**-12
        assert found.tolist() == [first, 0.25]


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
    factors = llama3_factors(resolve(config.to_dict()))
    assert factors[0] == 1.0
    assert factors[-1] == 32.0
    assert torch.allclose(plain / torch.tensor(factors), scaled, rtol=1e-5)


def test_no_factors_without_llama_3_scaling() -> None:
    assert rope_tensors(resolve(LlamaConfig().to_dict())) == {}


def test_the_attention_factor_of_longrope_is_that_of_transformers() -> None:
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "long_factor": [2.0] * 48,
        "short_factor": [1.0] * 48,
    }
    config = Phi3Config(
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=parameters,
    )
    _, expected = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    assert longrope_attention_factor(resolve(config.to_dict())) == pytest.approx(expected)


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
        ({}, {"architectures": ["MambaForCausalLM"]}, ConversionError, "llamacpp-converter"),
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
        NativeGGUF().plan(checkpoint, Q8_0)


def test_another_architecture_needs_the_converter_of_llama_cpp(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.producers.gguf.fallback.available", lambda: None)
    checkpoint = edited(tiny_llama, tmp_path / "edited", architectures=["GemmaForCausalLM"])
    with pytest.raises(ConversionError, match=r"GemmaForCausalLM.*engines install llamacpp-conv"):
        NativeGGUF().plan(checkpoint, Q8_0)


def test_a_stored_rotary_buffer_is_left_out(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    checkpoint = edited(tiny_llama, tmp_path / "edited", {name: torch.ones(32)})
    tensors = architectures.layout(checkpoint, checkpoint.hf_config.to_dict())
    assert name not in checkpoint.tensors
    assert len(tensors) == len(checkpoint.tensors)


@pytest.fixture(scope="module")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "mixtral"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return make_checkpoint(path, family="mixtral", num_local_experts=3, **small)


def test_experts_become_one_tensor(tiny_mixtral: Path) -> None:
    checkpoint = Checkpoint.open(tiny_mixtral)
    config = checkpoint.hf_config.to_dict()
    tensors = {t.name: t for t in architectures.layout(checkpoint, config)}
    assert len(tensors) == len(checkpoint.tensors) - 2 * 3 * 2
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        stack = tensors[f"blk.1.ffn_{ours}_exps.weight"]
        found = architectures.read_tensor(checkpoint, stack, config)
        assert found.dtype == torch.bfloat16
        assert found.shape == stack.shape
        for expert in range(3):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.{theirs}.weight"
            assert torch.equal(found[expert], checkpoint.read(name))


def test_experts_of_several_types_become_one_of_float32(tiny_mixtral: Path, tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    half = torch.full((32, 64), 1 + 2.0**-10, dtype=torch.float16)
    checkpoint = edited(tiny_mixtral, tmp_path / "edited", {name: half})
    config = checkpoint.hf_config.to_dict()
    (stack,) = (t for t in architectures.layout(checkpoint, config) if name in t.sources)
    found = architectures.read_tensor(checkpoint, stack, config)
    assert torch.equal(found[1], half.float())


def test_a_missing_expert_is_named(tiny_mixtral: Path, tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    checkpoint = edited(tiny_mixtral, tmp_path / "edited", {name: None})
    with pytest.raises(CheckpointError, match=rf"{name} \[64, 32\] is missing"):
        architectures.layout(checkpoint, checkpoint.hf_config.to_dict())


def test_float16_that_overflows_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    large = torch.full((512, 256), 1e5, dtype=torch.bfloat16)
    checkpoint = edited(
        tiny_llama, tmp_path / "edited", {"model.layers.0.mlp.up_proj.weight": large}
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(ConversionError, match=r"blk.0.ffn_up.weight holds 9.98e\+04, .*use BF16"):
        NativeGGUF().convert(checkpoint, Spec("gguf", "F16"), None, tmp_path / "out")
