from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.engines.base import Scorer
from quantkit.engines.transformers import Transformers, TransformersScorer
from quantkit.errors import EngineError, EvaluationError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.perplexity import windows
from quantkit.evaluation.plan import EvaluationPlan
from quantkit.evaluation.reference import Reference
from quantkit.evaluation.samples import METRICS_VERSION
from quantkit.ledger import Metric, require_comparable
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from tests.engine_configs import config
from tests.models import VOCABULARY, make_noisy

References = dict[str, Reference]
NAMES = [
    "ppl", "non_finite", "ppl_ratio", "kld_mean", "kld_min", "kld_median", "kld_p90", "kld_p95",
    "kld_p99", "kld_p999", "kld_max", "top1_agreement", "top5_agreement", "delta_p_mean",
    "delta_p_rms", "delta_p_min", "delta_p_p001", "delta_p_p01", "delta_p_p05", "delta_p_median",
    "delta_p_p95", "delta_p_p99", "delta_p_p999", "delta_p_max",
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


@pytest.fixture(scope="module")
def plan(source: Checkpoint) -> EvaluationPlan:
    ids = torch.randint(VOCABULARY, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    return EvaluationPlan(source.tokenizer, 2048, {"a": windows(ids, context=64)})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def reference(source: Checkpoint, plan: EvaluationPlan, cache: Path) -> References:
    return Reference.of_texts(source, plan.texts, cache)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The source with a little noise on its weights."""
    return Checkpoint.open(make_noisy(tmp_path_factory.mktemp("other") / "noisy", 0.01))


def test_the_reference_against_itself(
    source: Checkpoint, plan: EvaluationPlan, reference: References
) -> None:
    found = evaluate(source, reference, plan).texts["a"]
    metrics = found.metrics
    assert list(metrics) == NAMES
    assert found.profile is None
    assert metrics["kld_mean"].value == metrics["kld_max"].value == 0
    assert metrics["top1_agreement"].value == metrics["top5_agreement"].value == 1
    assert metrics["delta_p_rms"].value == metrics["non_finite"].value == 0
    assert metrics["ppl_ratio"].value == 1
    assert metrics["ppl"].n == metrics["kld_mean"].n == 7 * 31
    assert metrics["ppl"].reference is None
    assert metrics["kld_mean"].reference == "reference"
    assert str(metrics["ppl"].engine).startswith("transformers 5.")
    assert {m.protocol["metrics_version"] for m in metrics.values()} == {METRICS_VERSION}


def test_a_variant_against_a_slow_loop(
    source: Checkpoint,
    other: Checkpoint,
    plan: EvaluationPlan,
    reference: References,
    tmp_path: Path,
) -> None:
    whole = evaluate(other, reference, plan, details=tmp_path).texts["a"]
    metrics = whole.metrics
    nll, kld, same, change = [], [], [], []
    with TransformersScorer(source, 64) as p, TransformersScorer(other, 64) as q:
        for window in plan.texts["a"].ids:
            (a,), (b,) = p.logits([window], [0]), q.logits([window], [0])
            for t in range(32, 63):
                log_p = a[t].double().log_softmax(0)
                log_q = b[t].double().log_softmax(0)
                nll.append(-float(log_q[window[t + 1]]))
                kld.append(float((log_p.exp() * (log_p - log_q)).sum()))
                same.append(int(log_p.argmax() == log_q.argmax()))
                change.append(float((log_q.exp() - log_p.exp())[window[t + 1]]))
    n = len(nll)
    assert metrics["ppl"].value == pytest.approx(float(torch.tensor(nll).mean().exp()), rel=1e-5)
    assert metrics["kld_mean"].value == pytest.approx(sum(kld) / n, rel=1e-4)
    assert metrics["kld_max"].value == pytest.approx(max(kld), rel=1e-3)
    assert metrics["kld_median"].value == pytest.approx(sorted(kld)[n // 2], rel=1e-3)
    assert metrics["top1_agreement"].value == pytest.approx(sum(same) / n)
    assert 0 < sum(same) < n
    rms = (sum(x * x for x in change) / n) ** 0.5
    assert metrics["delta_p_rms"].value == pytest.approx(rms, rel=1e-3)
    assert metrics["delta_p_min"].value == pytest.approx(min(change), rel=1e-3)
    assert whole.windows["ppl"] == pytest.approx(
        [sum(nll[i : i + 31]) / 31 for i in range(0, n, 31)], abs=1e-4
    )
    assert whole.profile is not None
    assert whole.profile.worst[0].kld == metrics["kld_max"].value
    kept = load_file(tmp_path / "positions.safetensors")
    assert kept["a/nll"].shape == kept["a/kld"].shape == (7, 31)
    assert kept["a/nll"].flatten().tolist() == pytest.approx(nll, abs=1e-4)


def test_a_gguf_is_measured_in_llama_cpp(
    source: Checkpoint, plan: EvaluationPlan, reference: References, tmp_path: Path
) -> None:
    variant = convert(source, Spec.parse("gguf:F32"), None, tmp_path)
    metrics = evaluate(variant, reference, plan).texts["a"].metrics
    same = evaluate(source, reference, plan).texts["a"].metrics
    assert str(metrics["ppl"].engine).startswith("llamacpp 0.3.")
    assert metrics["ppl"].value == pytest.approx(same["ppl"].value, rel=1e-3)
    assert 0 < metrics["kld_mean"].value < 1e-4
    assert metrics["top1_agreement"].value > 0.98
    for name in NAMES:
        require_comparable(name, metrics[name], same[name])


def test_without_a_reference_there_is_perplexity_only(
    source: Checkpoint, plan: EvaluationPlan, reference: References
) -> None:
    metrics = evaluate(source, {}, plan).texts["a"].metrics
    assert list(metrics) == ["ppl", "non_finite"]
    with_reference = evaluate(source, reference, plan).texts["a"].metrics["ppl"]
    assert metrics["ppl"].value == pytest.approx(with_reference.value, rel=1e-6)


def test_a_reference_on_other_tokens_is_refused(
    source: Checkpoint, plan: EvaluationPlan, reference: References
) -> None:
    elsewhere = EvaluationPlan(source.tokenizer, 2048, {"a": windows(list(range(500)), context=64)})
    with pytest.raises(EvaluationError, match="built on other tokens"):
        evaluate(source, reference, elsewhere)


def test_non_finite_values_fail_with_their_count(
    source: Checkpoint, plan: EvaluationPlan, reference: References, tmp_path: Path
) -> None:
    """A token whose embedding is NaN: it spoils its own row of logits, everywhere."""
    path = tmp_path / "damaged"
    shutil.copytree(source.path, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][VOCABULARY - 1] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    damaged = Checkpoint.open(path)
    with pytest.raises(EvaluationError, match="at 217 of 217 scored positions of a"):
        evaluate(damaged, reference, plan)
    with pytest.raises(EvaluationError, match="the reference's own logits are not finite"):
        Reference.of_texts(damaged, plan.texts, tmp_path / "cache")


def _resized(source: Checkpoint, rows: int, path: Path) -> Checkpoint:
    """The source with rows of its vocabulary cut off, or zeros added."""
    shutil.copytree(source.path, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    tensors = load_file(path / "model.safetensors")
    old = tensors["model.embed_tokens.weight"][:rows]
    new = torch.zeros(rows, old.shape[1], dtype=old.dtype)
    new[: len(old)] = old
    save_file(
        tensors | {"model.embed_tokens.weight": new},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return Checkpoint.open(path)


def test_padding_of_the_vocabulary_is_cut(
    source: Checkpoint, plan: EvaluationPlan, reference: References, tmp_path: Path
) -> None:
    padded = _resized(source, VOCABULARY + 64, tmp_path / "padded")
    metrics = evaluate(padded, reference, plan).texts["a"].metrics
    assert metrics["kld_mean"].value == pytest.approx(0, abs=1e-7)
    assert metrics["kld_mean"].protocol["vocabulary"] == VOCABULARY


def test_a_smaller_vocabulary_is_refused(
    source: Checkpoint, plan: EvaluationPlan, reference: References, tmp_path: Path
) -> None:
    cut = _resized(source, VOCABULARY - 64, tmp_path / "cut")
    low = EvaluationPlan(source.tokenizer, 2048, {"a": windows(list(range(500)), context=64)})
    with pytest.raises(EvaluationError, match="960 tokens, the tokenizer has 1024"):
        evaluate(cut, {}, low)
    with pytest.raises(EngineError, match=r"token 10[0-9]+ in a vocabulary of 960"):
        evaluate(cut, reference, plan)


def test_logits_are_scored_window_by_window(
    source: Checkpoint, plan: EvaluationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded: a window's logits are gone before the one after next is asked for."""
    alive: list[int] = []

    class Watching(TransformersScorer):
        def logits(
            self, sequences: Sequence[Sequence[int]], first: Sequence[int]
        ) -> Iterator[torch.Tensor]:
            seen: list[weakref.ref[torch.Tensor]] = []
            for rows in super().logits(sequences, first):
                fresh = rows.clone()
                seen.append(weakref.ref(fresh))
                alive.append(sum(ref() is not None for ref in seen))
                yield fresh
                del fresh

    def scorer(self: Transformers, model: Checkpoint, context: int) -> Scorer:
        return Watching(model, context)

    monkeypatch.setattr(Transformers, "scorer", scorer)
    evaluate(source, {}, plan)
    assert len(alive) == 7
    assert max(alive) <= 2


def test_results_of_two_protocols_are_not_compared() -> None:
    def metric(**protocol: object) -> Metric:
        return Metric(
            value=1, stderr=0, n=1, reference=None, protocol=protocol, engine=config("x 1")
        )

    require_comparable("ppl", metric(context=512, bos=1), metric(bos=1, context=512))
    with pytest.raises(EvaluationError, match=r"ppl: measured in two ways.*context: 512 and 2048"):
        require_comparable("ppl", metric(context=512), metric(context=2048))
    with pytest.raises(EvaluationError, match="bos: None and 1"):
        require_comparable("ppl", metric(), metric(bos=1))


def test_several_texts_are_measured_as_each_alone_and_by_one_start(
    source: Checkpoint, other: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(7)
    draws = torch.randint(VOCABULARY, (2, 300), generator=generator).tolist()
    texts = {"a": windows(draws[0], context=64), "b": windows(draws[1], context=64, limit=2)}
    alone = {}
    for name, cut in texts.items():
        plan = EvaluationPlan(source.tokenizer, 2048, {name: cut})
        alone |= evaluate(other, Reference.of_texts(source, plan.texts, cache), plan).texts
    starts = []
    scorer = Transformers.scorer

    def noted(self: Transformers, model: Checkpoint, context: int) -> Scorer:
        starts.append(model.id)
        return scorer(self, model, context)

    monkeypatch.setattr(Transformers, "scorer", noted)
    plan = EvaluationPlan(source.tokenizer, 2048, texts)
    references = Reference.of_texts(source, texts, cache)
    together = evaluate(other, references, plan)
    assert together.texts == alone
    assert starts == [other.id]
    assert together.metrics == {}
    assert [one.metrics["ppl"].n for one in together.texts.values()] == [4 * 31, 2 * 31]
    a, b = (one.metrics["kld_mean"] for one in together.texts.values())
    assert (a.protocol["text"], b.protocol["text"]) == ("a", "b")
    with pytest.raises(EvaluationError, match="text_sha256"):
        require_comparable("kld_mean", a, b)
