"""Our numbers against llama.cpp's own tool, on the same files and the same text."""

from __future__ import annotations

import os
import pydoc_data.topics
import re
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.errors import RecipeError
from quantkit.evaluate import EvaluationPlan, evaluate
from quantkit.evaluate.divergence import delta_p, join, score
from quantkit.evaluate.perplexity import Windows, bos_id, windows
from quantkit.evaluate.statistics import (
    mean,
    perplexity,
    proportion,
    quantile,
    root_mean_square,
)
from quantkit.evaluate.tasks import run_task
from quantkit.ledger import Metric
from quantkit.spec import Spec
from quantkit.variant import Variant
from tests.conftest import SHARED_DATA

WINDOWS = 8
PACKAGES = Path(sysconfig.get_path("purelib"))
Tool = Callable[..., str]


@pytest.fixture(scope="module")
def variants(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variant]:
    out = tmp_path_factory.mktemp("gguf")
    return {
        scheme: convert(demo, Spec("gguf", scheme), None, out)
        for scheme in ("BF16", "Q8_0", "Q4_0")
    }


@pytest.fixture(scope="module")
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = getattr(request, "param", "pydoc")
    path = tmp_path_factory.mktemp("text") / f"{name}.txt"
    if name == "pydoc":
        whole = "\n".join(body for _, body in sorted(pydoc_data.topics.topics.items()))
    else:
        raw = SHARED_DATA / "wikitext-2-raw" / "wiki.test.raw"
        if not raw.is_file():
            pytest.skip(f"no WikiText-2 at {raw}: it is not in the project")
        whole = raw.read_text(encoding="utf-8")
    path.write_text(whole[:30000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cut(demo: Checkpoint, text: Path) -> Windows:
    ids = demo.tokenizer(text.read_text(encoding="utf-8"), verbose=False).input_ids
    return windows(ids, context=512, bos_id=bos_id(demo.tokenizer), limit=WINDOWS)


@pytest.fixture(scope="module")
def llama_perplexity() -> Tool:
    program = PACKAGES / "bin" / "llama-perplexity"
    if not program.is_file():
        pytest.skip(f"{program}: llama-cpp-python was built without its tools")

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            [program, "--ctx-size", "512", "--chunks", str(WINDOWS), "--threads", "2", *arguments],
            env={**os.environ, "LD_LIBRARY_PATH": str(PACKAGES / "lib")},
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
        return done.stdout + done.stderr

    return run


def _number(output: str, pattern: str) -> float:
    found = re.search(pattern, output)
    assert found is not None, output[-2000:]
    return float(found[1])


@pytest.mark.parametrize("text", ["pydoc", "wikitext-2"], indirect=True)
def test_perplexity_and_kld_agree_with_llama_perplexity(
    variants: dict[str, Variant], text: Path, cut: Windows, llama_perplexity: Tool, tmp_path: Path
) -> None:
    """Both against the same unquantized GGUF, in the same engine: what differs is our code."""
    saved = tmp_path / "base.kld"
    base = llama_perplexity(
        "-m", variants["BF16"].weights, "-f", text, "--kl-divergence-base", saved
    )
    inputs, first = cut.inputs(), [cut.first] * WINDOWS
    targets = [cut.targets(i) for i in range(WINDOWS)]
    with LlamaScorer(variants["BF16"], 512) as scorer:
        reference = list(scorer.logits(inputs, first))
    ours = perplexity(join([score(a, t) for a, t in zip(reference, targets, strict=True)]).nll)
    assert ours.value == pytest.approx(_number(base, r"PPL = ([\d.]+)"), rel=1e-3)
    assert ours.stderr == pytest.approx(_number(base, r"PPL = [\d.]+ \+/- ([\d.]+)"), rel=1e-2)
    for scheme in ("Q8_0", "Q4_0"):
        output = llama_perplexity(
            "-m", variants[scheme].weights, "--kl-divergence-base", saved, "--kl-divergence"
        )
        with LlamaScorer(variants[scheme], 512) as scorer:
            rows = scorer.logits(inputs, first)
            values = join(
                [score(b, t, a) for b, t, a in zip(rows, targets, reference, strict=True)]
            )
        drift = values.drift
        assert drift is not None

        def printed(pattern: str, output: str = output) -> float:
            return _number(output, pattern)

        # llama-perplexity keeps its base as 16-bit numbers over a range of 16 nats: what is less
        # likely than e^-16 times the likeliest token is taken to be just that likely.
        floor = 16 - drift.reference_confidence.log()
        drift = replace(drift, reference_nll=drift.reference_nll.minimum(floor))
        values = replace(values, drift=drift)
        ppl = perplexity(values.nll).value
        assert ppl == pytest.approx(printed(r"Mean PPL\(Q\)\s*:\s*([\d.]+)"), rel=1e-3)
        ratio = perplexity(values.nll - drift.reference_nll)
        assert ratio.value == pytest.approx(
            printed(r"PPL\(Q\)/PPL\(base\)\s*:\s*([\d.]+)"), rel=1e-4
        )
        error = printed(r"PPL\(Q\)/PPL\(base\)\s*:\s*[\d.]+ ±\s*([\d.]+)")
        assert ratio.stderr == pytest.approx(error, rel=1e-2, abs=1e-6)
        kld = mean(drift.kld)
        assert kld.value == pytest.approx(printed(r"Mean\s+KLD:\s*([\d.]+)"), rel=1e-2)
        error = printed(r"Mean\s+KLD:\s*[\d.]+ ±\s*([\d.]+)")
        assert kld.stderr == pytest.approx(error, rel=1e-2, abs=1e-6)
        for fraction, pattern in ((0.5, "Median"), (0.99, r"99\.0%"), (1.0, "Maximum")):
            expected = printed(rf"{pattern}\s+KLD:\s*([\d.]+)")
            found = quantile(drift.kld, fraction).value
            assert found == pytest.approx(expected, rel=1e-2, abs=1e-6), pattern
        # A near tie may fall either way: one or two of 2040 positions.
        top = 100 * proportion(drift.same_top).value
        assert top == pytest.approx(printed(r"Same top p:\s*([\d.]+)"), abs=0.2)
        # Δp is printed in percent, to three places.
        change = 100 * delta_p(values)
        rms = root_mean_square(change)
        assert rms.value == pytest.approx(printed(r"RMS Δp\s*:\s*([\d.]+)"), rel=1e-2)
        error = printed(r"RMS Δp\s*:\s*[\d.]+ ±\s*([\d.]+)")
        assert rms.stderr == pytest.approx(error, rel=1e-2, abs=1e-3)
        average = printed(r"Mean\s+Δp:\s*(-?[\d.]+)")
        assert mean(change).value == pytest.approx(average, rel=1e-2, abs=1e-3)
        for fraction, pattern in (
            (0.0, "Minimum"), (0.01, r"\s1\.0%"), (0.05, r"\s5\.0%"),
            (0.95, r"95\.0%"), (0.99, r"99\.0%"), (1.0, "Maximum"),
        ):  # fmt: skip
            expected = printed(rf"{pattern}\s+Δp:\s*(-?[\d.]+)%")
            found = quantile(change, fraction).value
            assert found == pytest.approx(expected, rel=1e-2, abs=1e-3), pattern


def test_the_source_and_its_gguf_are_the_same_model(
    demo: Checkpoint, variants: dict[str, Variant], cut: Windows, tmp_path: Path
) -> None:
    """Across engines: an unquantized GGUF in llama.cpp against the checkpoint in transformers."""
    from quantkit.evaluate.reference import Reference

    reference = Reference.build(demo, cut, tmp_path)
    plan = EvaluationPlan(demo.tokenizer, 2048, cut)
    found: dict[str, dict[str, Metric]] = {
        scheme: evaluate(variants[scheme], reference, plan).metrics
        for scheme in ("BF16", "Q8_0", "Q4_0")
    }
    itself = evaluate(demo, reference, plan).metrics
    assert found["BF16"]["ppl"].value == pytest.approx(itself["ppl"].value, rel=2e-3)
    drift = [found[scheme]["kld_mean"].value for scheme in ("BF16", "Q8_0", "Q4_0")]
    assert drift == sorted(drift)
    assert drift[0] < 2e-4
    assert found["BF16"]["top1_agreement"].value > 0.985


def test_questions_in_llama_cpp_are_answered_as_in_transformers(
    demo: Checkpoint, tmp_path: Path
) -> None:
    """In float32 on both sides: what is left is llama.cpp's 16-bit KV cache."""
    from quantkit.engines.transformers import TransformersScorer

    variant = convert(demo, Spec("gguf", "F32"), None, tmp_path)
    common = (demo.tokenizer, 8192)
    plain = run_task("mmlu_dev", lambda n: TransformersScorer(demo, n), *common, limit=20)
    gguf = run_task("mmlu_dev", lambda n: LlamaScorer(variant, n), *common, limit=20)
    assert plain.protocol == gguf.protocol
    ours = torch.tensor([answer["loglikelihoods"] for answer in gguf.answers])
    theirs = torch.tensor([answer["loglikelihoods"] for answer in plain.answers])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_unknown_task_has_a_suggestion(demo: Checkpoint) -> None:
    """Here because lm-eval takes some 10 s to list its tasks."""

    def refuse(context: int) -> LlamaScorer:
        raise AssertionError("the model was loaded")

    with pytest.raises(RecipeError, match=r"unknown task 'mmlu_def'.*did you mean 'mmlu_dev'"):
        run_task("mmlu_def", refuse, demo.tokenizer, 2048)
