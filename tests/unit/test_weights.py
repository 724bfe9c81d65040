"""Which weights a directory has: those that transformers takes, on every path of ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.decoder import proof
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.engines.transformers import TransformersScorer
from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.gguf.header import read_header
from quantkit.models import hub
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert, plan
from tests.integration.gguf_cases import CASES as FAMILIES
from tests.integration.gguf_cases import as_a_part, as_qwen_does
from tests.integration.gguf_cases import make as make_family
from tests.integration.gguf_oracle import convert as to_gguf
from tests.integration.gguf_oracle import loaded
from tests.models import make_checkpoint
from tests.weight_cases import CASES, EMBEDDING, HEAD, edit_tensors, make, with_another_head

IDS = torch.randint(3, 1000, (1, 64), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))


def _from_pretrained(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("name", CASES)
def test_every_path_has_the_weights_of_from_pretrained(name: str, tmp_path: Path) -> None:
    path = make(CASES[name], tmp_path / "model")
    expected = _from_pretrained(path)
    source = Checkpoint.open(path)
    with TransformersScorer(source, 64) as scorer:
        (found,) = scorer.logits(IDS.tolist(), [0])
        (states,) = scorer.hidden_states(IDS.tolist(), [0])
        output = scorer.output_weight
    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states @ output.T, expected[0], rtol=1e-5, atol=1e-5)
    blocks = DecoderBlocks(source, precision=torch.float32)
    streamed = proof.streamed(blocks, IDS, len(blocks))
    torch.testing.assert_close(streamed, expected, rtol=1e-5, atol=1e-5)
    assert source.hf_config.tie_word_embeddings == CASES[name].tied


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_has_the_weights_of_from_pretrained(name: str, tmp_path: Path) -> None:
    path = make(CASES[name], tmp_path / "model")
    expected = _from_pretrained(path)[0].log_softmax(-1)
    file = to_gguf(Checkpoint.open(path), "F32", tmp_path / "out")
    options = {"logits_all": True, "type_k": 0, "type_v": 0, "flash_attn": False}
    with loaded(file, n_ctx=64, **options) as llama:
        llama.eval(IDS[0].tolist())
        found = torch.tensor(np.array(llama.scores[:64])).log_softmax(-1)
    # Its GELU is an approximation from a table of halves.
    near = 5e-2 if CASES[name].family in ("gpt2", "gpt_neox") else 2e-3
    assert (found - expected).abs().max() < near
    names = {tensor.name for tensor in read_header(file).tensors}
    # As llama.cpp's converter, which writes whatever is stored.
    assert ("output.weight" in names) == (not CASES[name].tied or name == "the-same-head")


def test_a_gemma_2_with_an_output_layer_of_its_own_is_no_gguf(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", family="gemma2", head_dim=64)
    with_another_head(path)
    with pytest.raises(
        ConversionError, match=r"tie_word_embeddings False: llama\.cpp computes gemma2"
    ):
        plan(Checkpoint.open(path), Spec.parse("gguf:F32"))


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    path = make(CASES[name], tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    source = Checkpoint.open(path)
    assert source.parameters == sum(p.numel() for p in model.parameters())
    assert source.bytes == 2 * (
        source.parameters + sum(source.tensors[n].numel for n in source.twice)
    )
    assert source.scheme == "bf16"


# What a part sees by is a stand-in there, which transformers does not load.
WHOLE = [n for n, case in FAMILIES.items() if case.edit not in (as_a_part, as_qwen_does)]


@pytest.mark.parametrize("name", WHOLE)
def test_streamed_families_have_the_logits_of_from_pretrained(name: str, tmp_path: Path) -> None:
    proof.prove(Checkpoint.open(make_family(FAMILIES[name], tmp_path / "model")))


def test_the_proof_finds_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path / "model")
    source, run = Checkpoint.open(path), DecoderBlocks.run
    with_another_head(path)  # after it was opened as tied
    with pytest.raises(ConversionError, match="not the model that transformers loads"):
        proof.prove(source)
    monkeypatch.setattr(
        DecoderBlocks,
        "run",
        lambda blocks, index, block, batch: run(blocks, index, block, batch.roll(1, -1)),
    )
    other = Checkpoint.open(make_checkpoint(tmp_path / "other"))
    with pytest.raises(ConversionError, match="not the model that transformers loads"):
        convert(other, Spec.parse("gptq:w4g64"), _windows(other), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.note])
def test_what_is_not_what_it_seems_is_said_in_every_plan(name: str, tmp_path: Path) -> None:
    source = Checkpoint.open(make(CASES[name], tmp_path / "model"))
    assert [note for note in source.notes if CASES[name].note in note]
    if CASES[name].family == "llama":
        for spec in ("gptq:w4g64", "awq:w4g64", "gguf:Q8_0"):
            assert set(source.notes) <= set(plan(source, Spec.parse(spec)).notes)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.note])
def test_of_all_others_nothing_is_said(name: str, tmp_path: Path) -> None:
    assert Checkpoint.open(make(CASES[name], tmp_path / "model")).notes == ()


@pytest.mark.parametrize(
    ("name", "spec", "near"),
    [
        ("another-head-sharded", "gptq:w8g64", 0.05),
        ("another-head", "awq:w4g64", 0.4),
        ("the-head-alone", "gptq:w8g64", 0.05),
    ],
)
def test_a_variant_says_itself_whether_its_layers_are_tied(
    name: str, spec: str, near: float, tmp_path: Path
) -> None:
    """vLLM asks config.json alone: it leaves a stored output layer out where that ties."""
    source = Checkpoint.open(make(CASES[name], tmp_path / "model"))
    variant = convert(source, Spec.parse(spec), _windows(source), tmp_path)
    config = json.loads((variant.path / "config.json").read_text())
    assert config["tie_word_embeddings"] == CASES[name].tied
    stored = Checkpoint.open(variant.path)
    assert stored.notes == ()
    assert EMBEDDING in stored.tensors
    assert torch.equal(stored.read(EMBEDDING), source.read(EMBEDDING))
    if not CASES[name].tied:
        assert torch.equal(stored.read(HEAD), source.read(HEAD))
    assert variant.manifest
    assert set(source.notes) <= set(variant.manifest.notes)
    with TransformersScorer(variant, 64) as scorer:
        (found,) = scorer.logits(IDS.tolist(), [0])
    expected = _from_pretrained(tmp_path / "model")[0]
    difference = (found.log_softmax(-1) - expected.log_softmax(-1)).abs().mean()
    assert difference < near  # of another output layer, 0.9


def test_an_engine_that_looks_for_itself_is_given_the_model_alone(tmp_path: Path) -> None:
    """vLLM takes what an index names, or ``consolidated.safetensors`` before anything else."""
    plain = Checkpoint.open(make_checkpoint(tmp_path / "plain"))
    assert plain.weights == plain.path
    for name in ("older-shards", "other-weights", "shards-and-others", "another-head"):
        source = Checkpoint.open(make(CASES[name], tmp_path / name))
        given = source.weights
        assert given.name == source.path.name
        assert given == source.weights
        again = Checkpoint.open(given)
        assert again.notes == ()
        assert again.config == source.config
        assert {file.name for file in given.glob("*.safetensors*")} == {
            info.shard.name for info in source.tensors.values()
        } | ({source.index.name} if source.index else set())
        torch.testing.assert_close(_from_pretrained(given), _from_pretrained(source.path))


def test_a_layer_that_is_neither_tied_nor_there_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    edit_tensors(path, lambda tensors: tensors.pop(HEAD))
    source = Checkpoint.open(path)
    with pytest.raises(CheckpointError, match=r"missing, for example lm_head\.weight"):
        TransformersScorer(source, 64).__enter__()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .* is missing"):
        plan(source, Spec.parse("gptq:w4g64"))


def test_a_tensor_that_the_model_has_not_is_named(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    edit_tensors(path, lambda tensors: tensors.update({"v_head.weight": torch.ones(1, 256)}))
    source = Checkpoint.open(path)
    message = r"v_head\.weight \[1, 256\]: LlamaForCausalLM of its config\.json has no such tensor"
    with pytest.raises(CheckpointError, match=message):
        plan(source, Spec.parse("gptq:w4g64"))
    with pytest.raises(CheckpointError, match=message):
        TransformersScorer(source, 64).__enter__()


def test_biases_of_zeros_are_left_out_and_named(tmp_path: Path) -> None:
    """Some packages give every linear one."""
    path = make_checkpoint(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.bias"
    edit_tensors(path, lambda tensors: tensors.update({name: torch.zeros(512)}))
    notes = plan(Checkpoint.open(path), Spec.parse("gptq:w4g64")).notes
    assert notes == (f"1 tensors are left out, as by transformers: {name}",)
    edit_tensors(path, lambda tensors: tensors[name].fill_(1))
    with pytest.raises(CheckpointError, match=r"up_proj\.bias .*has no such tensor"):
        plan(Checkpoint.open(path), Spec.parse("gptq:w4g64"))


def test_files_that_are_not_the_model_are_not_taken_for_it(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model")
    (path / "model.safetensors").rename(path / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors.*; consolidated\.saf"):
        Checkpoint.open(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint.open(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "w.safetensors"})
    )
    with pytest.raises(
        CheckpointError, match=r"w\.safetensors: no such file; config\.json names it"
    ):
        Checkpoint.open(path)


PLACES = (
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.self_attn.q_proj.bias",
    "model.layers.1.mlp.down_proj.weight",
)


@pytest.mark.parametrize("spec", ["gptq:w4g64", "awq:w4g64"])
@pytest.mark.parametrize("name", PLACES)
def test_what_is_not_finite_is_refused_by_name(spec: str, name: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", family="qwen2", tie_word_embeddings=False)
    value = float("nan") if spec == "gptq:w4g64" else float("-inf")
    edit_tensors(path, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    source = Checkpoint.open(path)
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity"):
        convert(source, Spec.parse(spec), _windows(source), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_the_hub_is_asked_for_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    there = [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "gptq_model-4bit-128g.safetensors",
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "consolidated.safetensors.index.json",
        "adapter_model.safetensors",
        "model.fp16.safetensors",
        "original/model.safetensors",
        "checkpoint-500/model-00001-of-00002.safetensors",
        "pytorch_model.bin",
    ]
    wanted: list[str] = []

    def snapshot(_name: str, revision: None, **patterns: list[str]) -> str:
        wanted.extend(filter_repo_objects(there, **patterns))
        return "/"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    hub.download("org/name")
    assert wanted == there[:6]


def _windows(source: Checkpoint) -> Calibration:
    return calibrate(
        load_text("pydoc:calibration"), source.tokenizer, samples=2, sequence_length=32, seed=0
    )
