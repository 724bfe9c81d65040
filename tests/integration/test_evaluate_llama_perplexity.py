"""Our numbers against llama.cpp's own tool, on the same files and the same text.

Both run the same llama.cpp, so that what could differ is our code: ids, BOS, windows, positions,
metrics. Two things do differ, both in how the tool keeps its base: tokens less likely than e^-16
are left out of its KLD, and where they are the true ones they count as e^-16 times the likeliest.
Fed with what the tool kept, our metrics are its own to the digits that it prints.
"""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from quantkit.data.calibration import bos_id
from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.evaluation.divergence import Drift, Positions, join, score
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.perplexity import Windows, windows
from quantkit.evaluation.plan import EvaluationPlan
from quantkit.evaluation.statistics import Estimate, perplexity, quantile
from quantkit.evaluation.text import summaries
from quantkit.ledger import Metric
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert
from tests import llama_perplexity
from tests.conftest import SHARED_DATA
from tests.gguf_families import FAMILIES
from tests.llama_perplexity import Base, Printed, printed
from tests.models import begin_with_bos, make_checkpoint

TOKENS = 2048
"""Read by each model in each case: four windows of 512, or one of 2048."""
OURS = {
    "ppl": "Mean PPL(Q)",
    "kld_mean": "Mean KLD", "kld_median": "Median KLD", "kld_p90": "90.0% KLD",
    "kld_p95": "95.0% KLD", "kld_p99": "99.0% KLD", "kld_p999": "99.9% KLD",
    "kld_max": "Maximum KLD",
    "top1_agreement": "Same top p",
    "delta_p_mean": "Mean Δp", "delta_p_rms": "RMS Δp", "delta_p_min": "Minimum Δp",
    "delta_p_p001": "0.1% Δp", "delta_p_p01": "1.0% Δp", "delta_p_p05": "5.0% Δp",
    "delta_p_median": "Median Δp", "delta_p_p95": "95.0% Δp", "delta_p_p99": "99.0% Δp",
    "delta_p_p999": "99.9% Δp", "delta_p_max": "Maximum Δp",
}  # fmt: skip
PERCENT = ("top1_agreement", "delta_p")
"""What the tool prints in percent, to three places; all else to six."""
SINGLE = ("kld_median", "kld_p90", "kld_p95", "kld_p99", "kld_p999", "kld_max")
"""The divergence at one position."""


@pytest.fixture(scope="module")
def variants(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variant]:
    out = tmp_path_factory.mktemp("gguf")
    return {
        scheme: convert(demo, Spec("gguf", scheme), None, out)
        for scheme in ("BF16", "Q8_0", "Q4_K_M", "Q4_0")
    }


@pytest.fixture(scope="module", autouse=True)
def _tool() -> None:
    if not llama_perplexity.PROGRAM.is_file():
        pytest.skip(f"{llama_perplexity.PROGRAM}: llama-cpp-python was built without its tools")


def _text(name: str, directory: Path) -> Path:
    if name == "pydoc":
        whole = "\n".join(body for _, body in sorted(pydoc_data.topics.topics.items()))
    else:
        raw = SHARED_DATA / "wikitext-2-raw" / "wiki.test.raw"
        if not raw.is_file():
            pytest.skip(f"no WikiText-2 at {raw}: it is not in the project")
        whole = raw.read_text(encoding="utf-8")
    path = directory / f"{name}.txt"
    path.write_text(whole[:30000], encoding="utf-8")
    return path


def _cut(checkpoint: Checkpoint, text: Path, context: int) -> Windows:
    ids = checkpoint.tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids
    return windows(ids, context, bos_id(checkpoint.tokenizer), limit=TOKENS // context)


def _logits(variant: Variant, cut: Windows) -> Iterator[torch.Tensor]:
    with LlamaScorer(variant, cut.context) as scorer:
        for rows in scorer.logits(cut.ids, [cut.first] * len(cut.ids)):
            yield rows[: cut.scored]


@dataclass(frozen=True)
class Compared:
    """A variant against a base: in our code, and in the tool.

    ``theirs``: what it printed; ``base_ppl`` as it printed when it read the base. ``ours``: all
    metrics; ``fed``: our metrics of the tool's file of the base, by the tool's rule. ``tail``: the
    mean divergence, nats, of the tokens that this rule leaves out.
    """

    theirs: dict[str, Printed]
    base_ppl: Printed
    ours: dict[str, Estimate]
    own_base: Estimate
    fed: Positions
    tail: float


def _compare(base: Variant, variant: Variant, text: Path, cut: Windows, work: Path) -> Compared:
    size = {"context": cut.context, "windows": len(cut.ids)}
    saved = work / "base"
    read = llama_perplexity.run("-m", base.weights, "-f", text, "--save-all-logits", saved, **size)
    kept = Base.open(saved)
    expected = torch.tensor(cut.ids)
    assert torch.equal(torch.from_numpy(kept.ids)[:, 1:], expected[:, 1:].int())
    output = llama_perplexity.run(
        "-m", variant.weights, "--kl-divergence-base", saved, "--kl-divergence", **size
    )
    ours, fed, tail, base_nll = [], [], [], []
    rows = zip(_logits(variant, cut), _logits(base, cut), kept.log_probs(), strict=True)
    for index, window in enumerate(rows):
        # A block of positions at a time: in float64 a whole window is some GB.
        parts = (tensor.split(64) for tensor in (*window, cut.targets(index)))
        for model, reference, stored, targets in zip(*parts, strict=True):
            ours.append(score(model, targets, reference))
            fed.append(_by_its_rule(model, stored, targets))
            log_p, log_q = reference.double().log_softmax(-1), model.double().log_softmax(-1)
            tail.append(torch.where(log_p > -16, 0, log_p.exp() * (log_p - log_q)).sum(-1))
            base_nll.append(score(reference, targets).nll)
    saved.unlink()
    return Compared(
        printed(output),
        printed(read)["PPL"],
        dict(summaries(join(ours))),
        perplexity(torch.cat(base_nll)),
        join(fed),
        float(torch.cat(tail).mean()),
    )


def _by_its_rule(model: torch.Tensor, log_p: torch.Tensor, targets: torch.Tensor) -> Positions:
    """What llama-perplexity makes of its stored base: the sum over tokens beyond e^-16 only."""
    plain = score(model, targets)
    log_p = log_p.double()
    kept = torch.where(log_p > -16, log_p.exp(), 0)
    top = torch.from_numpy(log_p.numpy().argmax(-1))  # the first of equals, as there
    unknown = torch.zeros_like(plain.nll)
    drift = Drift(
        kld=(kept * (log_p - model.double().log_softmax(-1))).sum(-1),
        reference_nll=-log_p.gather(-1, targets[:, None])[:, 0],
        top=model.argmax(-1),
        reference_top=top,
        confidence=unknown,
        reference_confidence=unknown,
        shared_top=unknown,
    )
    return Positions(plain.nll, plain.finite, drift)


def _check(found: Compared) -> None:
    theirs, ours = found.theirs, found.ours
    # The same model on the same tokens: nothing but the last digit.
    value, error = found.base_ppl
    assert found.own_base.value == pytest.approx(value, rel=1e-5)
    assert found.own_base.stderr == pytest.approx(error, rel=1e-4)
    value, error = theirs["Mean PPL(Q)"]
    assert ours["ppl"].value == pytest.approx(value, rel=1e-6)
    assert ours["ppl"].stderr == pytest.approx(error, rel=1e-5)
    # The tool's own ratio knows the base only to e^-16; from its two runs it is exact.
    ratio = math.log(value / found.base_ppl.value)
    assert math.log(ours["ppl_ratio"].value) == pytest.approx(ratio, rel=1e-3, abs=1e-5)
    # Within 1 % where its file tells nothing finer: it prints to six places (percent to three),
    # and rounds each log probability to a step of 2.4e-4 nats: a mean of many moves by some 1e-5,
    # a single position, which a quantile is, by up to half a step.
    for name, words in OURS.items():
        scale, place = (1, 1.2e-4) if name in SINGLE else (1, 3e-5)
        if name.startswith(PERCENT):
            scale, place = 100, 1e-3
        value, error = theirs[words]
        assert scale * ours[name].value == pytest.approx(value, rel=1e-2, abs=place), name
        if error is not None:
            assert scale * ours[name].stderr == pytest.approx(error, rel=1e-2, abs=place), name
    # What is left of the difference is what it leaves out.
    assert ours["kld_mean"].value - found.tail == pytest.approx(theirs["Mean KLD"].value, abs=3e-6)


def _check_fed(found: Compared) -> None:
    """From the file that the tool read, everything that it prints.

    To the last digit or two, but for quantiles between two far values: it weighs them in float32.
    """
    drift = found.fed.drift
    assert drift is not None
    ours = dict(summaries(found.fed))
    for name, words in OURS.items():
        scale, place = (100, 1.1e-3) if name.startswith(PERCENT) else (1, 3e-6)
        value, error = found.theirs[words]
        assert scale * ours[name].value == pytest.approx(value, rel=1e-4, abs=place), name
        if error is not None:
            assert scale * ours[name].stderr == pytest.approx(error, rel=1e-4, abs=place), name
    for words, fraction in llama_perplexity.QUANTILES.items():
        if f"{words} KLD" in found.theirs:
            value, _ = found.theirs[f"{words} KLD"]
            assert quantile(drift.kld, fraction).value == pytest.approx(value, rel=1e-4, abs=3e-6)
    value, error = found.theirs["Mean ln(PPL(Q)/PPL(base))"]
    assert math.log(ours["ppl_ratio"].value) == pytest.approx(value, abs=3e-6)
    relative = ours["ppl_ratio"].stderr
    assert relative is not None
    assert relative / ours["ppl_ratio"].value == pytest.approx(error, rel=1e-3, abs=3e-6)


@pytest.mark.parametrize(
    ("name", "context", "scheme"),
    [
        ("pydoc", 512, "Q8_0"),
        ("pydoc", 2048, "Q4_K_M"),
        ("wikitext-2", 512, "Q4_K_M"),
    ],
)
def test_the_demo_agrees_with_llama_perplexity(
    demo: Checkpoint,
    variants: dict[str, Variant],
    name: str,
    context: int,
    scheme: str,
    tmp_path: Path,
) -> None:
    """It begins texts without BOS, although it declares one."""
    text = _text(name, tmp_path)
    cut = _cut(demo, text, context)
    assert cut.bos_id is None
    found = _compare(variants["BF16"], variants[scheme], text, cut, tmp_path)
    _check(found)
    _check_fed(found)


@pytest.mark.parametrize("kind", ["SentencePiece with BOS", "BPE with BOS", "Qwen2 without"])
def test_other_tokenizers_with_bos_and_without_agree(
    llama_cpp_source: Path, kind: str, tmp_path: Path
) -> None:
    """Llama 2's and Llama 3's manner of beginning texts; Qwen2 declares a BOS and does not."""
    if kind == "BPE with BOS":
        path = make_checkpoint(tmp_path / "model")
        begin_with_bos(path)
    else:
        qwen = kind == "Qwen2 without"
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        written = FAMILIES["Qwen2.5" if qwen else "Llama-2"]
        rows = written.write(llama_cpp_source / "models", tokenizer)
        path = make_checkpoint(tmp_path / "model", family=written.model_type, vocab_size=rows)
        (path / "tokenizer.json").unlink()
        for file in tokenizer.iterdir():
            file.rename(path / file.name)
    source = Checkpoint.open(path)
    text = _text("pydoc", tmp_path)
    base, variant = (
        convert(source, Spec("gguf", scheme), None, tmp_path) for scheme in ("BF16", "Q8_0")
    )
    # Qwen's 152,000 tokens take a GB a model at 2048, which the demo, without BOS too, covers.
    for context in (512,) if kind == "Qwen2 without" else (512, 2048):
        cut = _cut(source, text, context)
        assert cut.bos_id == (None if kind == "Qwen2 without" else 1)
        found = _compare(base, variant, text, cut, tmp_path)
        _check(found)
        _check_fed(found)


@pytest.fixture(scope="module")
def cut(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Windows:
    return _cut(demo, _text("pydoc", tmp_path_factory.mktemp("text")), 512)


def test_the_source_and_its_gguf_are_the_same_model(
    demo: Checkpoint, variants: dict[str, Variant], cut: Windows, tmp_path: Path
) -> None:
    """Across engines: an unquantized GGUF in llama.cpp against the checkpoint in transformers."""
    from quantkit.evaluation.reference import Reference

    references = {"pydoc": Reference.build(demo, cut, tmp_path)}
    plan = EvaluationPlan(demo.tokenizer, 2048, {"pydoc": cut})
    found: dict[str, dict[str, Metric]] = {
        scheme: evaluate(variants[scheme], references, plan).texts["pydoc"].metrics
        for scheme in ("BF16", "Q8_0", "Q4_0")
    }
    itself = evaluate(demo, references, plan).texts["pydoc"].metrics
    assert found["BF16"]["ppl"].value == pytest.approx(itself["ppl"].value, rel=2e-3)
    drift = [found[scheme]["kld_mean"].value for scheme in ("BF16", "Q8_0", "Q4_0")]
    assert drift == sorted(drift)
    assert drift[0] < 2e-4
    assert found["BF16"]["top1_agreement"].value > 0.985
