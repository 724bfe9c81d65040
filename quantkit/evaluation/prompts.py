"""The user's own prompts: a variant's greedy answers and the reference's, and how far apart the
two are along the reference's.

Greedy decoding goes on from whatever it wrote: after the first token that differs, two answers are
about different beginnings, and comparing them token by token says nothing more. The divergence is
therefore taken along one answer, the reference's, which both models are made to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.engines.base import config_of, scoring
from quantkit.errors import EvaluationError
from quantkit.evaluation.prompt_reference import ReferenceAnswers, along, answer, in_order
from quantkit.evaluation.samples import METRICS_VERSION, Evaluated
from quantkit.evaluation.text import cut_padding
from quantkit.ledger import REFERENCE, Metric
from quantkit.system.files import write_json
from quantkit.system.progress import track

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from quantkit.engines.base import Engine
    from quantkit.evaluation.prompt_pairs import Pair
    from quantkit.evaluation.statistics import Estimate
    from quantkit.ledger.prompt_drift import PromptDrift
    from quantkit.models.variant import Model


def measure_prompts(
    model: Model,
    engine: Engine,
    reference: ReferenceAnswers,
    tokenizer: PreTrainedTokenizerBase,
    details: Path | None = None,
) -> Evaluated:
    """Answer every prompt and compare with the reference's answers.

    Metrics, over prompts: ``prompts_exact_match`` and ``prompts_text_match`` (shares),
    ``prompts_kld_mean`` (nats per token; its error is clustered by prompt, as tokens of one answer
    depend on each other), ``prompts_answer_tokens``. ``details`` receives ``prompts.json``.

    Raise EvaluationError for another vocabulary or non-finite logits.
    """
    from quantkit.evaluation.prompt_pairs import pair, summarize

    prompts = reference.prompts
    vocabulary = min(len(tokenizer), reference.vocabulary)
    answers, divergences = _ask(model, engine, reference, vocabulary)
    pairs = [
        pair(prompt, known, given, kld, tokenizer)
        for prompt, known, given, kld in zip(
            prompts.entries, reference.answers, answers, divergences, strict=True
        )
    ]
    if details is not None:
        details.mkdir(parents=True, exist_ok=True)
        write_json(details / "prompts.json", [one.details() for one in pairs])
    drift = summarize(pairs, prompts, tokenizer)
    own = reference.is_of(model)
    protocol = {
        **prompts.protocol(),
        "vocabulary": vocabulary,
        "reference_sha256": reference.source,
        "metrics_version": METRICS_VERSION,
    }
    metrics = {
        f"prompts_{name}": Metric(
            value=estimate.value,
            stderr=estimate.stderr,
            n=estimate.n,
            reference=None if name == "answer_tokens" else REFERENCE,
            protocol=protocol,
            engine=reference.engine if own else config_of(engine),
        )
        for name, estimate in _summaries(drift, pairs)
    }
    return Evaluated(metrics=metrics, prompts=None if own else drift)


def _ask(
    model: Model, engine: Engine, reference: ReferenceAnswers, vocabulary: int
) -> tuple[list[tuple[int, ...]], list[torch.Tensor]]:
    """The model's answers, and its divergence at each token of the reference's."""
    prompts = reference.prompts
    order = in_order(prompts)
    if reference.is_of(model):
        own = (reference.logits(i) for i in order)
        return list(reference.answers), _divergences(own, order, model, reference, vocabulary)
    with scoring(engine, model).scorer(model, prompts.context) as scorer:
        # First what finds and counts logits that are not numbers.
        rows = scorer.logits(*along(prompts, reference.answers, order))
        divergences = _divergences(rows, order, model, reference, vocabulary)
        return answer(scorer, prompts, model.id), divergences


def _divergences(
    rows: Iterator[torch.Tensor],
    order: list[int],
    model: Model,
    reference: ReferenceAnswers,
    vocabulary: int,
) -> list[torch.Tensor]:
    """``(tokens,) float64`` of each prompt, in the file's order; ``rows`` come in ``order``."""
    import torch

    from quantkit.evaluation.divergence import score

    found = [torch.empty(0)] * len(order)
    bad = 0
    tracked = track(rows, f"{model.id}: prompts", len(order))
    for i, logits in zip(order, tracked, strict=True):
        values = score(
            cut_padding(logits, vocabulary, model),
            torch.tensor(reference.answers[i]),
            reference.logits(i)[:, :vocabulary],
        )
        bad += values.non_finite
        if values.drift is not None:
            found[i] = values.drift.kld
    if bad:
        raise EvaluationError(
            f"{model.path}: non-finite logits at {bad} of {sum(map(len, reference.answers))} "
            "tokens of the reference's answers; nothing is computed from the rest"
        )
    return found


def _summaries(drift: PromptDrift, pairs: list[Pair]) -> Iterator[tuple[str, Estimate]]:
    import torch

    from quantkit.evaluation.statistics import Estimate, mean

    whole = drift.overall
    yield "exact_match", Estimate(whole.exact_match, whole.exact_match_stderr, whole.n)
    yield "text_match", Estimate(whole.text_match, whole.text_match_stderr, whole.n)
    yield "kld_mean", Estimate(whole.kld_mean, whole.kld_stderr, whole.n)
    yield "answer_tokens", mean(torch.tensor([len(one.answer) for one in pairs]))
