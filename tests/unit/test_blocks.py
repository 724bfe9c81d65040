"""Streaming block by block gives what transformers' whole model gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.proof import prove
from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.gguf.architectures import SUPPORTED
from quantkit.models.checkpoint import Checkpoint
from quantkit.quantize.inputs import InputStatistics
from tests.integration.gguf_cases import CASES, make
from tests.models import make_checkpoint

IDS = torch.randint(3, 1000, (5, 48), generator=torch.Generator().manual_seed(3))
STREAMED = (
    "mistral", "mixtral", "qwen3", "qwen3-moe", "gemma-2", "gemma-3", "gemma-3-scaled", "phi-3",
    "phi-3-128k", "olmo-2", "granite-3", "stablelm-2", "gpt-2", "gpt-2-hub", "pythia", "gpt-neox",
    "deepseek-v2", "smollm-3", "ministral-3", "olmo-3", "ernie-4.5", "seed-oss", "glm-4", "lfm-2",
    "gpt-oss",    "qwen-3.5", "qwen-3.5-moe",
)  # fmt: skip
"""Of each family one, or one of each of the layouts in which it comes."""


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_qwen2"])
def test_blocks_in_turn_equal_the_whole_model(model: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(model)
    blocks = DecoderBlocks(Checkpoint.open(path))
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model
    with torch.no_grad():
        expected = whole(IDS, output_hidden_states=True).hidden_states
        hidden = torch.cat(list(blocks.embed(IDS)))
        assert torch.equal(hidden, expected[0])
        for index in range(len(blocks) - 1):
            hidden = blocks.load(index)(hidden, **blocks.arguments(index, hidden.shape[1]))
            torch.testing.assert_close(hidden, expected[index + 1], rtol=1e-4, atol=1e-4)


def test_every_architecture_that_becomes_a_gguf_streams() -> None:
    names = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CASES[name].family] for name in STREAMED}
    assert names | {"LlamaForCausalLM", "Qwen2ForCausalLM"} == {
        name for name in SUPPORTED if not name.endswith("ForConditionalGeneration")
    }
    families = {case.family for case in CASES.values()} - {"llama", "qwen2"}  # the fixtures
    assert {CASES[name].family for name in STREAMED} == families


@pytest.mark.parametrize("name", STREAMED)
def test_blocks_of_other_families_give_what_the_whole_model_does(name: str, tmp_path: Path) -> None:
    path = make(CASES[name], tmp_path / name)
    blocks = DecoderBlocks(Checkpoint.open(path), precision=torch.float32)
    # Only the eager attention of transformers has Gemma 2's soft cap and gpt-oss's sinks.
    attention = "eager" if name in ("gemma-2", "gpt-oss") else "sdpa"
    whole = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=attention
    ).base_model
    with torch.no_grad():
        expected = whole(IDS, output_hidden_states=True).hidden_states
        hidden = blocks.embed(IDS)
        assert torch.equal(torch.cat(list(hidden)), expected[0])
        for index in range(len(blocks) - 1):
            block = blocks.load(index)
            for number, batch in enumerate(hidden):
                hidden.replace(number, blocks.run(index, block, batch))
            torch.testing.assert_close(
                torch.cat(list(hidden)), expected[index + 1], rtol=1e-4, atol=1e-4
            )


def test_statistics_equal_a_loop_over_recorded_inputs(tiny_qwen2: Path) -> None:
    blocks = DecoderBlocks(Checkpoint.open(tiny_qwen2), precision=torch.bfloat16)
    block, hidden = blocks.load(0), blocks.embed(IDS)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in blocks.linears(0)}
    for name in blocks.linears(0):
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(
                inputs[0].reshape(-1, inputs[0].shape[-1])
            )
        )
    statistics = InputStatistics(block, blocks.linears(0))
    for batch in hidden:
        blocks.run(0, block, batch)
    statistics.close()
    assert statistics.shared() == {
        "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.o_proj": ["self_attn.o_proj"],
        "mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down_proj": ["mlp.down_proj"],
    }
    for name in blocks.linears(0):
        x = torch.cat(seen[name]).bfloat16().double()  # what the linear multiplies
        leader = statistics.leader[name]
        torch.testing.assert_close(
            statistics.hessian[leader].double(), x.T @ x, rtol=1e-4, atol=1e-3
        )
        torch.testing.assert_close(
            statistics.mean_abs[leader].double(), x.abs().mean(0), rtol=1e-4, atol=1e-5
        )


def test_what_is_no_decoder_of_blocks_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "other")
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"LlamaForSequenceClassification.*LlamaForCausalLM"):
        DecoderBlocks(Checkpoint.open(path))


def test_a_model_whose_blocks_do_not_run_apart_is_named(tmp_path: Path) -> None:
    """XMOD has no adapters unless its config names languages."""
    path = make_checkpoint(tmp_path / "xmod", family="xmod")
    with pytest.raises(ConversionError, match=r"blocks of Xmod\w+ cannot be run one by"):
        prove(Checkpoint.open(path))


def test_shapes_that_config_json_does_not_describe_are_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    for file in tiny_llama.iterdir():
        text = file.read_bytes()
        if file.name == "config.json":
            text = text.replace(b'"intermediate_size": 512', b'"intermediate_size": 384')
        (tmp_path / file.name).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj\.weight has shape .* asks for"):
        DecoderBlocks(Checkpoint.open(tmp_path))


def test_tensors_outside_are_all_that_no_block_owns(tiny_qwen2: Path) -> None:
    blocks = DecoderBlocks(Checkpoint.open(tiny_qwen2))
    assert sorted(blocks.tensors_outside()) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    assert all(isinstance(blocks.load(1).get_submodule(n), nn.Linear) for n in blocks.linears(1))
