"""The same questions to the same weights on transformers, llama.cpp and vLLM: one start of vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch

from quantkit import toolchains
from quantkit.data.texts import load_text
from quantkit.engines.base import LanguageModel
from quantkit.engines.transformers import Transformers
from quantkit.engines.vllm import VLLM
from quantkit.engines.vllm.completions import HOST
from quantkit.engines.vllm.served import ServedModel
from quantkit.errors import ToolchainError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.plan import EvaluationPlan
from quantkit.ledger import require_comparable
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.engine_config import EngineConfig
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from tests.integration.servers import tree, wait_until_gone

TASKS = ("mmlu_dev", "template_answers", "wikitext_file")
"""Likelihoods of choices, answers, and rolling likelihoods of whole texts."""
PROMPTS = ("The capital of France is", "def add(a, b):\n", "Once upon a time", "Water is made of")


@pytest.fixture(scope="module")
def served(demo: Checkpoint) -> Iterator[LanguageModel]:
    """The demo source in vLLM's server, in bf16."""
    try:
        toolchains.find("vllm")
    except ToolchainError as error:
        pytest.skip(str(error))
    import psutil

    before = set(psutil.Process().children(recursive=True))
    with VLLM().language_model(demo, 1024) as model:
        family = [p for p in tree(psutil.Process().pid)[1:] if p not in before]
        assert len(family) >= 4  # supervisor, API, engine core, worker
        yield model
    wait_until_gone(family, 0.1)


def test_likelihoods_and_answers_differ_by_rounding_only(
    served: LanguageModel, demo: Checkpoint
) -> None:
    """A text token by token, choices of one token each, choices of several, and greedy answers."""
    ids = demo.tokenizer(load_text("pydoc:evaluation").text[:8000]).input_ids
    texts = [ids[start : start + 150] for start in (0, 150)]
    choices = [[*ids[300:450], *end] for end in ([5], [6], [7], [8, 9, 10], [8, 9, 11])]
    sequences, first = [*texts, *choices], [1, 1, 150, 150, 150, 150, 150]
    prompts = [demo.tokenizer(prompt).input_ids for prompt in PROMPTS]
    end = demo.tokenizer.eos_token_id
    found = list(served.likelihoods(sequences, first))
    written = list(served.generate(prompts, 12, lambda answer: answer[-1] == end))
    with Transformers().language_model(demo, 1024) as model:
        expected = list(model.likelihoods(sequences, first))
        answers = list(model.generate(prompts, 12, lambda answer: answer[-1] == end))
    assert [len(scores.log_probs) for scores in found] == [149, 149, 1, 1, 1, 3, 3]
    gaps = torch.cat(
        [
            ours.log_probs - theirs.log_probs
            for ours, theirs in zip(found[:2], expected[:2], strict=True)
        ]
    )
    assert gaps.abs().mean() <= 0.05
    assert gaps.mean().abs() <= 0.02
    same = torch.cat(
        [ours.is_top == theirs.is_top for ours, theirs in zip(found, expected, strict=True)]
    )
    assert same.float().mean() >= 0.95
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0.05, atol=0.5)
    starts = [ours[:4] == theirs[:4] for ours, theirs in zip(written, answers, strict=True)]
    assert sum(starts) >= 3
    assert all(len(answer) <= 12 for answer in written)


def _read_and_cached(served: ServedModel) -> tuple[float, float]:
    """Tokens of all prompts that vLLM looked up in its prefix cache, and found there."""
    asked = served._completions
    key = {"Authorization": f"Bearer {asked.api_key}"}
    with urlopen(Request(f"http://{HOST}:{asked.port}/metrics", headers=key)) as response:
        lines = response.read().decode().splitlines()
    return tuple(  # type: ignore[return-value]
        sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith(f"vllm:prefix_cache_{name}")
        )
        for name in ("queries_total", "hits_total")
    )


def test_choices_of_several_tokens_compute_their_context_once(
    served: ServedModel, demo: Checkpoint
) -> None:
    """By vLLM's own metrics: four choices of three tokens each after a context of 300."""
    ids = demo.tokenizer(load_text("pydoc:evaluation").text[8000:16000]).input_ids
    choices = [[*ids[:300], *ids[start : start + 3]] for start in (400, 500, 600, 700)]
    before = _read_and_cached(served)
    list(served.likelihoods(choices, [300] * 4))
    read, cached = (b - a for a, b in zip(before, _read_and_cached(served), strict=True))
    # Once the context, and each of the eight longer prompts: nine blocks of 32 of them are cached.
    assert read == 300 + 4 * 301 + 4 * 302
    assert read - cached <= 300 + 4 * 13 + 4 * 14
    assert read - cached < 4 * 302 / 2


def test_a_task_gives_nearly_the_same_on_every_engine(
    served: LanguageModel, demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLLM, "language_model", lambda *_: nullcontext(served))
    text = load_text("pydoc:evaluation").text
    articles = (
        f" = {name} = \n\n {text[at : at + 1200]}\n" for name, at in (("A", 0), ("B", 5000))
    )
    (tmp_path / "wiki.raw").write_text("\n".join(articles))
    data = {"wikitext_file": str(tmp_path / "wiki.raw")}
    # 200 tokens: each article is read in several windows.
    plan = EvaluationPlan(demo.tokenizer, 200, tasks=TASKS, limit=16, data=data)
    gguf = convert(demo, Spec.parse("gguf:BF16"), None, tmp_path)
    on = {
        "transformers": evaluate(demo, {}, plan),
        "llamacpp": evaluate(gguf, {}, plan),
        "vllm": evaluate(demo, {}, replace(plan, engine=EngineConfig(name="vllm"))),
    }
    accuracies = [found.metrics["mmlu_acc"] for found in on.values()]
    picks = [found.answers["mmlu_acc"].picks for found in on.values()]
    assert [m.engine.name for m in accuracies] == list(on)
    for accuracy, picked in zip(accuracies[1:], picks[1:], strict=True):
        require_comparable("mmlu_acc", accuracies[0], accuracy)
        assert accuracy.n == 16
        assert sum(a != b for a, b in zip(picks[0], picked, strict=True)) <= 3
    for found in on.values():
        matches = found.metrics["template_answers_exact_match_stripped"]
        require_comparable(
            "exact_match", on["vllm"].metrics["template_answers_exact_match_stripped"], matches
        )
        assert matches.n == 4
        words = found.metrics["wikitext_word_perplexity"]
        exact = on["transformers"].metrics["wikitext_word_perplexity"]
        require_comparable("wikitext", exact, words)
        assert words.value == pytest.approx(exact.value, rel=0.05)
