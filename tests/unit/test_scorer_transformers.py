from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit.data.calibration import calibrate
from quantkit.data.texts import load_text
from quantkit.engines import load_engine, serving_engine
from quantkit.engines.base import scoring
from quantkit.engines.transformers import Transformers, TransformersScorer
from quantkit.engines.transformers import scorer as engine
from quantkit.errors import CheckpointError, EngineError, IncompatibleVariant
from quantkit.formats import awq, gptq
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.engine_config import EngineConfig
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from tests.models import VOCABULARY, make_checkpoint
from tests.plain_weights import plain_weights

LENGTHS = [400, 300, 299, 40, 7, 6, 2]


def _sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2"])
def test_batching_and_padding_do_not_change_logits(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Against transformers' own loading and its own forward pass, one sequence at a time."""
    path: Path = request.getfixturevalue(name)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sequences = _sequences()
    first = [200, 299, 0, 39, 3, 0, 1]
    with TransformersScorer(Checkpoint.open(path), 512) as scorer:
        found = list(scorer.logits(sequences, first))
    assert len(found) == len(sequences)
    for sequence, start, logits in zip(sequences, first, found, strict=True):
        with torch.inference_mode():
            alone = plain(input_ids=torch.tensor([sequence])).logits[0, start:]
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("spec", "dequantize"), [("gptq:w4g64", gptq), ("awq:w4g64", awq)])
def test_a_quantized_checkpoint_is_scored_with_its_unpacked_weights(
    spec: str, dequantize: ModuleType, tiny_llama: Path, tmp_path: Path
) -> None:
    """Against the plain checkpoint that holds the dequantized weights, loaded by transformers."""
    source = Checkpoint.open(tiny_llama)
    text = load_text("pydoc:calibration")
    calibration = calibrate(text, source.tokenizer, samples=4, sequence_length=64, seed=0)
    variant = convert(source, Spec.parse(spec), calibration, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    before = plain(input_ids=torch.arange(20)[None]).logits[0]
    plain.load_state_dict(dict(plain_weights(variant.path)), strict=False)
    with torch.inference_mode():
        expected = plain(input_ids=torch.arange(20)[None]).logits[0]
    with TransformersScorer(variant, 64) as scorer:
        (found,) = scorer.logits([range(20)], [0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.05


def test_hidden_states_times_the_output_layer_are_the_logits(tiny_qwen2: Path) -> None:
    sequences = _sequences()
    first = [len(s) // 2 for s in sequences]
    with TransformersScorer(Checkpoint.open(tiny_qwen2), 512) as scorer:
        hidden = list(scorer.hidden_states(sequences, first))
        output = scorer.output_weight
        logits = list(scorer.logits(sequences, first))
    for states, expected in zip(hidden, logits, strict=True):
        torch.testing.assert_close(states @ output.T, expected, rtol=1e-5, atol=1e-5)


def test_batches_keep_the_order_and_the_budget() -> None:
    sequences = [[0] * n for n in (100, 100, 60, 500, 3, 3)]
    batches = list(engine._batches(sequences, 300))
    assert batches == [[0, 1, 2], [3], [4, 5]]


def test_larger_batches_give_the_same_logits(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = torch.randint(VOCABULARY, (5, 300), generator=torch.Generator().manual_seed(0))
    sequences, shapes = drawn.tolist(), []
    monkeypatch.setattr(engine, "_TOKENS_PER_BATCH", {"cpu": 512, "cuda": 512})
    body = TransformersScorer._body
    monkeypatch.setattr(
        TransformersScorer, "_body", lambda s, ids: (shapes.append(len(ids)), body(s, ids))[1]
    )
    found = []
    for batch in (1, 2):
        with Transformers({"batch": batch}).scorer(Checkpoint.open(tiny_llama), 300) as scorer:
            shapes.clear()
            found.append(list(scorer.logits(sequences, [150] * 5)))
        assert shapes == {1: [1] * 5, 2: [3, 2]}[batch]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_sequence_longer_than_the_context_is_refused(tiny_llama: Path) -> None:
    with (
        TransformersScorer(Checkpoint.open(tiny_llama), 16) as scorer,
        pytest.raises(EngineError, match="17 tokens, the scorer was opened for 16"),
    ):
        list(scorer.logits([[1] * 17], [0]))


def test_logits_that_are_more_than_a_product_are_refused(tmp_path: Path) -> None:
    """Gemma 2 caps its logits: hidden states times the output layer would be other numbers."""
    path = make_checkpoint(
        tmp_path / "gemma2",
        family="gemma2",
        head_dim=64,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    with (
        pytest.raises(IncompatibleVariant, match="Gemma2ForCausalLM does more to its logits"),
        TransformersScorer(Checkpoint.open(path), 16),
    ):
        pass


def test_a_missing_tensor_is_an_error_not_a_random_one(tiny_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.raises(
            CheckpointError, match=r"missing, for example model\.layers\.1\.mlp\.up_proj"
        ),
        TransformersScorer(Checkpoint.open(broken), 16),
    ):
        pass


def test_a_tensor_that_the_config_does_not_describe_is_an_error(
    tiny_llama: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with (
        pytest.raises(CheckpointError, match=r"mlp\.\w+\.weight .* has the shape \[256, 256\]"),
        TransformersScorer(Checkpoint.open(broken), 16),
    ):
        pass


def test_does_not_serve(tiny_llama: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    with pytest.raises(IncompatibleVariant, match="transformers does not serve"):
        serving_engine(source, EngineConfig(name="transformers"))
    with pytest.raises(IncompatibleVariant, match="vllm gives no logits of the whole vocabulary"):
        scoring(load_engine("vllm"), source)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_names_that_transformers_has_otherwise(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / family, family=family)
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if family == "gpt2":  # as OpenAI's: without the prefix, and with the masks of its attention
        state = load_file(path / "model.safetensors")
        state = {name.removeprefix("transformer."): weight for name, weight in state.items()}
        state["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode():
        wanted = expected(input_ids=torch.arange(3, 23)[None]).logits[0]
    with TransformersScorer(Checkpoint.open(path), 64) as scorer:
        (found,) = scorer.logits([range(3, 23)], [0])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
