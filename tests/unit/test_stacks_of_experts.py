"""Experts one by one compute what transformers' stacks of them do, in every form of stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantkit.decoder import blocks as decoder
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.experts import Experts, separate
from quantkit.decoder.proof import streamed
from quantkit.engines.transformers.weights import load
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.stored_names import StoredNames
from tests.integration.small_decoders import make, small_config

FORMS = {
    "qwen2_moe": "gate and up one after the other",
    "gpt_oss": "turned, gate and up in turns, biases, a gate of its own",
    "llama4_text": "turned, each given every token",
    "nemotron_h": "no gate",
}


def _fused(model_type: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(model_type), dtype=torch.float32)
    outer = nn.Module()
    outer.experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    for parameter in outer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return outer


@pytest.mark.parametrize("model_type", FORMS)
def test_experts_compute_what_a_stack_does(model_type: str) -> None:
    outer = _fused(model_type)
    fused = outer.experts
    width = fused.down_proj.shape[2 if model_type in ("gpt_oss", "llama4_text") else 1]
    x = torch.randn(8, width)
    routes: tuple[torch.Tensor, ...] = ()
    if model_type != "llama4_text":
        routes = (torch.randint(4, (8, 2)), torch.rand(8, 2))
    with torch.no_grad():
        expected = fused(x, *routes)
        separate(outer)
        found: Any = outer.experts
        assert isinstance(found, Experts)
        for leaf, stack in found.stacks.items():
            for name, cut in stack.cuts():
                found.get_parameter(name).data = cut(getattr(fused, leaf).data)
        torch.testing.assert_close(found(x, *routes), expected, atol=1e-4, rtol=1e-4)


def test_a_stored_stack_is_cut_and_experts_stored_apart_are_named(tmp_path: Path) -> None:
    source = Checkpoint.open(make("granitemoe", tmp_path / "stacked"))
    blocks = DecoderBlocks(source)
    stack = source.read("model.layers.0.block_sparse_moe.input_linear.weight")
    name = "model.layers.0.block_sparse_moe.experts.2.up_proj.weight"
    half = stack.shape[1] // 2
    assert torch.equal(blocks.checkpoint.read(name), stack[2, half:])
    assert blocks.linears(0)["block_sparse_moe.experts.2.up_proj"] == name.removesuffix(".weight")
    assert blocks.checkpoint.parameters == source.parameters

    apart = Checkpoint.open(make("mixtral", tmp_path / "apart"))
    blocks = DecoderBlocks(apart)
    assert blocks.checkpoint is apart
    names = blocks.linears(1)
    assert names["mlp.experts.3.gate_proj"] == "model.layers.1.block_sparse_moe.experts.3.w1"
    assert names["mlp.experts.3.down_proj"] == "model.layers.1.block_sparse_moe.experts.3.w2"


def test_names_are_those_of_the_checkpoint() -> None:
    """OpenAI's GPT-2 was saved without its head."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small_config("gpt2"))
    names = StoredNames.of(model, ["wte.weight", "h.0.ln_1.weight"])
    assert names("transformer.h.0.ln_1.weight") == "h.0.ln_1.weight"
    assert names("transformer.h.1.ln_1.weight") == "h.1.ln_1.weight"


@pytest.mark.parametrize("model_type", ["gemma4_text", "bloom"])
def test_what_a_model_gives_to_blocks_goes_with_its_windows(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 4 gives each block inputs of the tokens; Bloom biases for each head of each window."""
    monkeypatch.setattr(decoder, "_BATCH_TOKENS", 64)  # two windows at a time
    source = Checkpoint.open(make(model_type, tmp_path / "model"))
    ids = torch.randint(3, 900, (5, 32), generator=torch.Generator().manual_seed(3))
    blocks = DecoderBlocks(source)
    model: Any = load(source, torch.float32)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(streamed(blocks, ids, len(blocks)), expected, atol=1e-4, rtol=0)
    hidden = blocks.embed(ids)
    chosen = torch.tensor([4, 1])
    both = blocks.run(0, blocks.load(0), hidden.pick(chosen))
    blocks.advance(0, blocks.load(0), hidden)
    torch.testing.assert_close(both, hidden.pick(chosen), atol=1e-5, rtol=0)
