"""Families that only llama.cpp's converter converts: what is made of them is the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.data.calibration import Calibration
from quantkit.errors import ConversionError
from quantkit.formats.gguf.imatrix import ImportanceMatrix
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import IMATRIX, CalibrationRecord, Variant
from quantkit.producers import convert as conversion
from quantkit.runs import pipeline
from quantkit.runs.recipe import load_recipe
from tests.integration.gguf_oracle import loaded, tool
from tests.models import make_checkpoint

LENGTH = 128
HUNYUAN = {"head_dim": 64, "pad_token_id": 0, "tie_word_embeddings": False}
TEXT = "for index in range(len(names)):\n    print('%s: %d' % (names[index], index))\n"
WEIGHTED = Spec("gguf", "Q4_K_M").having({"imatrix": True}, "weighted")
SPECS = (Spec("gguf", "F32"), Spec("gguf", "F16"), Spec("gguf", "Q4_K_M"), WEIGHTED)


@pytest.fixture(scope="module", autouse=True)
def converter(llama_cpp_source: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTKIT_LLAMA_CPP", str(llama_cpp_source))
        patch.setenv("QUANTKIT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Hunyuan, with a tokenizer that llama.cpp's converter has never seen."""
    directory = tmp_path_factory.mktemp("source") / "Hunyuan-tiny"
    return Checkpoint.open(make_checkpoint(directory, family="hunyuan_v1_dense", **HUNYUAN))


@pytest.fixture(scope="module")
def calibration(hunyuan: Checkpoint) -> Calibration:
    ids = hunyuan.tokenizer(TEXT * 40, add_special_tokens=False).input_ids[: 4 * LENGTH]
    record = CalibrationRecord(
        dataset="loops", revision=None, samples=4, sequence_length=LENGTH, seed=0, sha256=""
    )
    windows = torch.tensor(ids).view(4, LENGTH)
    return Calibration(windows, record, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def made(
    hunyuan: Checkpoint, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> dict[Spec, Variant]:
    out = tmp_path_factory.mktemp("variants")
    found = conversion.convert_many(hunyuan, SPECS, calibration, out)
    for variant in found.values():
        if isinstance(variant, Exception):
            raise variant
    return {spec: variant for spec, variant in found.items() if isinstance(variant, Variant)}


def test_plan_and_manifest_name_the_converter(
    hunyuan: Checkpoint, made: dict[Spec, Variant]
) -> None:
    for spec in SPECS:
        planned = conversion.plan(hunyuan, spec)
        assert planned.notes[0].startswith(
            "HunYuanDenseV1ForCausalLM is converted by llama.cpp's own conv"
        )
        manifest = made[spec].manifest
        assert set(planned.notes) <= set(manifest.notes)
        assert manifest.spec["converter"].startswith("llama.cpp (")
        assert "convert_hf_to_gguf.py" in manifest.tools
        counted = any("computed by llama-imatrix" in note for note in manifest.notes)
        assert counted == (spec is WEIGHTED) == planned.needs_calibration
        assert manifest.proof["tokens"].differences == []
        kept = {str(file.relative_to(made[spec].path)) for file in made[spec].path.rglob("*")}
        assert kept == {*manifest.files, "quantkit.json"}


@pytest.mark.parametrize(("scheme", "most"), [("F32", 1e-3), ("F16", 2e-2)])
def test_llama_cpp_computes_what_transformers_does(
    hunyuan: Checkpoint, made: dict[Spec, Variant], scheme: str, most: float
) -> None:
    """Beside 16-bit weights llama.cpp rounds activations to 16 bits."""
    from transformers import AutoModelForCausalLM

    ids = hunyuan.tokenizer(TEXT).input_ids
    reference = AutoModelForCausalLM.from_pretrained(hunyuan.path, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    file = made[Spec("gguf", scheme)].weights
    with loaded(file, n_ctx=LENGTH, logits_all=True, type_k=0, type_v=0) as model:
        assert model.tokenize(TEXT.encode(), add_bos=False) == ids
        model.eval(ids)
        found = torch.tensor(np.array(model.scores[: len(ids)])).log_softmax(-1)
    assert (found - expected).abs().max() < most


def test_quantized_files_equal_llama_quantizes(
    made: dict[Spec, Variant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = made[Spec("gguf", "F32")].weights  # bf16 as F32: the same values
    monkeypatch.chdir(made[WEIGHTED].path)  # the matrix's name, as given, is in the metadata
    for spec, matrix in ((SPECS[2], ()), (WEIGHTED, ("--imatrix", IMATRIX))):
        theirs = tmp_path / f"{spec.directory}.gguf"
        tool("llama-quantize", *matrix, full, theirs, "Q4_K_M", 1)
        assert made[spec].weights.read_bytes() == theirs.read_bytes()


def test_the_importance_matrix_is_of_the_calibrations_tokens(
    hunyuan: Checkpoint, calibration: Calibration, made: dict[Spec, Variant]
) -> None:
    """Against sums over the inputs of transformers' own linears."""
    from transformers import AutoModelForCausalLM

    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(hunyuan.path, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for index, block in enumerate(model.model.layers):
        for module, name in names.items():

            def watch(_: object, inputs: tuple[torch.Tensor], at: str = f"{index}.{name}") -> None:
                seen[f"blk.{at}.weight"] = inputs[0].square().sum((0, 1))

            block.get_submodule(module).register_forward_pre_hook(watch)
    with torch.no_grad():
        model(calibration.ids)
    found = ImportanceMatrix.read(made[WEIGHTED].path / IMATRIX)
    assert (found.datasets, found.chunks, found.chunk_size) == (("loops",), 4, LENGTH)
    assert found.entries.keys() == seen.keys()
    for name, expected in seen.items():
        entry = found.entries[name]
        assert entry.counts.tolist() == [calibration.ids.numel()]
        difference = np.abs(entry.sums[0] - expected.numpy()) / expected.numpy()
        assert difference.max() < 0.05, name  # llama.cpp multiplies bf16, in a 16-bit cache


def test_what_the_converter_refuses_leaves_a_line_and_nothing_else(
    hunyuan: Checkpoint, calibration: Calibration, tmp_path: Path
) -> None:
    """GLM's converter asks for GLM's own tokens, which this tokenizer lacks."""
    glm = Checkpoint.open(make_checkpoint(tmp_path / "glm", family="glm4_moe", pad_token_id=0))
    with pytest.raises(ConversionError) as caught:
        conversion.convert(glm, WEIGHTED, calibration, tmp_path / "variants")
    told = str(caught.value)
    assert told.startswith("gguf: glm: llama.cpp's own converter (")
    assert "refused it: KeyError: '[gMASK]' at `" in told
    assert "(base.py, line " in told
    assert "\n" not in told
    assert not list((tmp_path / "variants").rglob("*"))


def test_what_llama_cpp_would_not_load_is_refused_before_the_work(tmp_path: Path) -> None:
    """It knows no OLMoE whose output layer is tied; its converter writes one."""
    settings = {"tie_word_embeddings": True, "num_experts": 4, "num_experts_per_tok": 2}
    tied = Checkpoint.open(make_checkpoint(tmp_path / "tied", family="olmoe", **settings))
    with pytest.raises(ConversionError) as caught:
        conversion.plan(tied, Spec("gguf", "F16"))
    told = str(caught.value)
    assert "but llama.cpp does not load what that writes: " in told
    assert "tensor 'output.weight' not found" in told
    assert "\n" not in told


def test_a_run_splits_its_loss(hunyuan: Checkpoint, tmp_path: Path) -> None:
    settings = (
        f"source={hunyuan.path}", "bench=null", "evaluate.prompts=null", "evaluate.windows=4",
        "evaluate.texts=[pydoc:evaluation]", "evaluate.context=128", "evaluate.split_windows=4",
        "convert=[gguf:F32, gguf:Q4_0]",
    )  # fmt: skip
    ledger = pipeline.run(load_recipe("quickstart", [*settings]), tmp_path / "run")
    assert not ledger.failed
    full, quantized = (row.loss for row in ledger.variants[1:])
    assert full is not None
    assert quantized is not None
    for loss in (full, quantized):
        known = [part for part in (loss.conversion, loss.quantization, loss.engine) if part]
        assert len(known) == 3
        assert sum(part.value for part in known) == pytest.approx(loss.total.value, abs=1e-9)
        assert ["measured in llama.cpp" in note for note in loss.notes] == [True]
        assert abs(known[0].value) < 2e-3  # the converter made the same model
    assert full.engine is not None
    assert full.engine.value == pytest.approx(0, abs=1e-6)  # the very same file
    assert abs(quantized.kld_quantization.value - quantized.kld.value) < 0.3 * quantized.kld.value
    assert quantized.kld.value > 10 * full.kld.value
    assert not list((tmp_path / "run" / "cache").rglob("*.gguf"))
