"""Losses split on real engines: every architecture unpacked, and parts that must be nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.engines.transformers import Transformers
from quantkit.engines.vllm import VLLM
from quantkit.errors import ToolchainError
from quantkit.evaluation.divergence import score
from quantkit.formats.gguf.unpacked import UnpackedGGUF
from quantkit.ledger import Ledger
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.variant import Variant
from quantkit.runs import pipeline
from quantkit.runs.recipe import Recipe, load_recipe
from tests.integration.gguf_cases import CASES, make
from tests.integration.gguf_oracle import convert
from tests.models import VOCABULARY
from tests.vllm_kernels import needs_integer_kernels

TIED = "lm_head.weight"


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_is_had_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    """But for norms to which 1 was added, and decays that were exponentials: what that rounded off
    stays off."""
    source = Checkpoint.open(make(CASES[name], tmp_path / name))
    unpacked = UnpackedGGUF.of(source, convert(source, "F32", tmp_path / "made"))
    added = CASES[name].family.startswith(("gemma", "qwen3_5"))
    for tensor, info in source.tensors.items():
        if tensor not in unpacked.tensors:
            # What the config makes superfluous: a tied output layer, and what is no weight.
            tied = tensor == TIED and source.config.get("tie_word_embeddings", True)
            beside = "visual." in tensor or tensor.startswith("mtp.")
            assert tied or beside or tensor.endswith((".bias", "_bias", "inv_freq")), tensor
            continue
        expected, found = source.read(tensor).float(), unpacked.read(tensor).float()
        if tensor.endswith("A_log"):
            near = 2e-3 if info.torch_dtype == torch.float16 else 1e-6
            torch.testing.assert_close(found, expected, rtol=near, atol=near)
            continue
        if added and "norm" in tensor and "linear_attn" not in tensor:
            half = info.torch_dtype == torch.float16
            one = source.read(tensor) + 1 if half else expected + 1
            expected = one.float() - 1
        assert torch.equal(found, expected), tensor
        assert unpacked.tensors[tensor].shape == found.shape


@pytest.mark.parametrize(("scheme", "most"), [("F32", 1e-5), ("Q4_0", 2e-3), ("Q4_K_S", 5e-3)])
def test_unpacked_weights_are_the_model_that_llama_cpp_runs(
    tiny_llama: Path, tmp_path: Path, scheme: str, most: float
) -> None:
    """What is left is the engine's: activations in 8 bits, in longer blocks beside K-quants."""
    source = Checkpoint.open(tiny_llama)
    file = convert(source, scheme, tmp_path / "made")
    ids = torch.randint(VOCABULARY, (257,), generator=torch.Generator().manual_seed(0)).tolist()
    targets = torch.tensor(ids[1:])
    with Transformers().scorer(UnpackedGGUF.of(source, file), 256) as unpacked:
        (own,) = unpacked.logits([ids[:-1]], [0])
    with Transformers().scorer(source, 256) as reference:
        (base,) = reference.logits([ids[:-1]], [0])
    with LlamaScorer(Variant("made", file, "gguf", scheme, None), 256) as served:
        (there,) = served.logits([ids[:-1]], [0])
    drift, lost = score(there, targets, own).drift, score(own, targets, base).drift
    assert drift is not None
    assert lost is not None
    assert float(drift.kld.mean()) < most
    if scheme != "F32":
        assert float(lost.kld.mean()) > 5 * float(drift.kld.mean())


def _recipe(source: Path, *overrides: str) -> Recipe:
    settings = (
        f"source={source}", "bench=null", "evaluate.prompts=null", "evaluate.windows=6",
        "evaluate.context=128", "evaluate.split_windows=4", "calibration.samples=4",
        "calibration.sequence_length=128",
    )  # fmt: skip
    return load_recipe("quickstart", [*settings, *overrides])


@needs_integer_kernels
def test_a_run_splits_every_loss(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reference engine in vLLM's place the engine's part and its floor are nothing."""
    monkeypatch.setattr(VLLM, "version", lambda _: "0.0.0")
    monkeypatch.setattr(VLLM, "check", lambda *_: None)
    monkeypatch.setattr(
        VLLM, "language_model", lambda _, *given: Transformers().scorer(*given), raising=False
    )
    out = tmp_path / "run"
    recipe = _recipe(tiny_llama, "convert=[gguf:F32, gguf:Q4_0, gptq:w4g64]")
    ledger = pipeline.run(recipe, out)
    assert not ledger.failed
    assert ledger.reference.loss is None
    own = ledger.reference.texts["pydoc:evaluation"].metrics
    full, q4, gptq = (row.loss for row in ledger.variants[1:])
    assert full is not None
    assert q4 is not None
    assert gptq is not None
    for loss in (full, q4, gptq):
        known = [loss.conversion, loss.quantization, loss.engine]
        total = sum(one.value for one in known if one is not None)
        assert total == pytest.approx(loss.total.value, abs=1e-12)
        assert (loss.windows, loss.notes) == (4, [])
        assert loss.protocol["text"] == "pydoc:evaluation"  # the first of two
        assert loss.protocol["metrics_version"] == own["ppl"].protocol[
            "metrics_version"
        ]  # fmt: skip
    for part in (full.conversion, full.quantization, full.engine, full.total):
        assert part is not None
        assert part.value == pytest.approx(0, abs=2e-3)
    assert full.quantization is not None
    assert full.quantization.value == full.quantization.stderr == 0  # the very same weights
    assert q4.conversion == full.conversion
    assert q4.kld is not None
    assert q4.kld_quantization is not None
    assert q4.kld_quantization.value == pytest.approx(q4.kld.value, rel=0.2)
    assert gptq.conversion is None
    assert gptq.engine is not None
    assert gptq.engine.value == pytest.approx(0, abs=1e-6)
    # As the run's own evaluation has it, on the first four of its six windows.
    assert gptq.kld_quantization is not None
    whole = ledger.variants[3].texts["pydoc:evaluation"].metrics["kld_mean"].value
    assert gptq.kld_quantization.value == pytest.approx(whole, rel=0.3)

    batches, llamacpp, vllm = ledger.noise_floor
    assert (batches.batch, batches.weights) == (2, vllm.weights)
    assert batches.engine == own["ppl"].engine.having({"batch": 2}).model_copy(
        update={"version": own["ppl"].engine.version}
    )
    assert batches.kld is not None
    assert 0 <= batches.kld.value < 1e-9  # float32 on a CPU
    assert batches.nll.value == pytest.approx(0, abs=1e-7)
    assert llamacpp.engine.name == "llamacpp"
    assert llamacpp.nll == full.conversion
    assert llamacpp.kld is not None
    assert 0 < llamacpp.kld.value < 1e-3 < q4.kld.value
    assert llamacpp.top1_agreement is not None
    assert llamacpp.top1_agreement.value > 0.97
    assert (str(vllm.engine), vllm.kld) == ("vllm 0.0.0", None)
    assert vllm.nll.value == pytest.approx(0, abs=1e-6)
    assert "4 windows of pydoc:evaluation" in (out / "report.html").read_text(encoding="utf-8")
    assert not list((out / "cache").rglob("*.gguf"))  # the unquantized one is gone

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("quantkit.evaluation.text.measure_texts", refuse)
    monkeypatch.setattr("quantkit.evaluation.split.window_likelihoods", refuse)
    again = pipeline.run(recipe, out)
    assert [row.loss for row in again.variants] == [row.loss for row in ledger.variants]
    assert again.noise_floor == ledger.noise_floor
    assert Ledger.read(out / "ledger.json") == again


def test_without_the_serving_engine_the_row_says_so(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ToolchainError("vllm is not installed; run: quantkit engines install vllm")

    monkeypatch.setattr(VLLM, "version", lambda _: None)
    monkeypatch.setattr(VLLM, "check", missing)
    ledger = pipeline.run(_recipe(tiny_llama, "convert=[gptq:w4g64]"), tmp_path / "run")
    assert not ledger.failed
    assert [floor.batch for floor in ledger.noise_floor] == [2]
    loss = ledger.variants[1].loss
    assert loss is not None
    assert (loss.engine, loss.serving_engine) == (None, None)
    assert loss.total == loss.quantization
    assert loss.notes == [
        "engine not measured: vllm is not installed; run: quantkit engines install vllm"
    ]
