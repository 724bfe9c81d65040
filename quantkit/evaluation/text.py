"""The metrics of texts: one pass over their windows, scored against the reference and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.engines.base import config_of, scoring
from quantkit.errors import EvaluationError
from quantkit.evaluation.samples import METRICS_VERSION, MeasuredText
from quantkit.ledger import REFERENCE, Metric
from quantkit.system.progress import track

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from quantkit.engines.base import Engine, Scorer
    from quantkit.evaluation.divergence import Positions
    from quantkit.evaluation.perplexity import Windows
    from quantkit.evaluation.reference import Reference
    from quantkit.evaluation.statistics import Estimate
    from quantkit.models.variant import Model

_KLD_QUANTILES = {
    "min": 0.0, "median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1.0,
}  # fmt: skip
_DELTA_P_QUANTILES = {
    "min": 0.0, "p001": 0.001, "p01": 0.01, "p05": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99,
    "p999": 0.999, "max": 1.0,
}  # fmt: skip
"""Those of llama-perplexity's that say something: p999 is its 99.9 %."""
_ABSOLUTE = ("ppl", "non_finite")
"""What of the text's metrics needs no reference."""


def measure_texts(
    model: Model,
    engine: Engine,
    texts: Mapping[str, Windows],
    references: Mapping[str, Reference],
    tokenizer: PreTrainedTokenizerBase,
    details: Path | None,
    *,
    anew: bool = False,
) -> dict[str, MeasuredText]:
    """Perplexity on each text, and the drift from ``references`` that were built on the same
    windows, where there are any. The model is loaded once.

    ``anew``: run the model even where it is the reference's own, whose logits are known. Raise
    EvaluationError for another text, another vocabulary, or non-finite logits.
    """
    for name, windows in texts.items():
        if references and (name not in references or references[name].windows != windows):
            raise EvaluationError("the reference was built on other tokens; build it on the plan's")
    known = bool(references) and all(one.is_of(model) for one in references.values())
    found: dict[str, tuple[MeasuredText, Positions]] = {}
    with ExitStack() as stack:
        scorer = None
        if anew or not known:
            context = max(windows.context for windows in texts.values())
            scorer = stack.enter_context(scoring(engine, model).scorer(model, context))
        for name, windows in texts.items():
            reference = references.get(name)
            found[name] = _measure(model, engine, scorer, name, windows, reference, tokenizer)
    if details is not None:
        _write_positions(found, texts, details)
    return {name: measured for name, (measured, _) in found.items()}


def _measure(
    model: Model,
    engine: Engine,
    scorer: Scorer | None,
    name: str,
    windows: Windows,
    reference: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[MeasuredText, Positions]:
    """One text; without a ``scorer`` the logits are the reference's."""
    from quantkit.evaluation.profile import profile

    vocabulary = len(tokenizer)
    if reference is not None:
        # Some tokenizers know more tokens than the model has rows.
        vocabulary = min(vocabulary, reference.vocabulary)
    own = reference is not None and reference.is_of(model)
    values = _score(model, scorer, name, windows, reference, vocabulary)
    if values.non_finite:
        raise EvaluationError(
            f"{model.path}: non-finite logits at {values.non_finite} of {values.nll.numel()} "
            f"scored positions of {name}; nothing is computed from the rest"
        )
    version = reference.engine if reference and own else config_of(engine)
    protocol = {
        "text": name,
        **windows.protocol(),
        "vocabulary": vocabulary,
        "metrics_version": METRICS_VERSION,
    }
    drift = protocol | {"reference_sha256": reference.source if reference else None}
    metrics = {
        metric: Metric(
            value=estimate.value,
            stderr=estimate.stderr,
            n=estimate.n,
            reference=None if metric in _ABSOLUTE else REFERENCE,
            protocol=protocol if metric in _ABSOLUTE else drift,
            engine=version,
        )
        for metric, estimate in summaries(values)
    }
    means = {"ppl": values.nll} | ({"kld_mean": values.drift.kld} if values.drift else {})
    measured = MeasuredText(
        metrics=metrics,
        profile=None if reference is None or own else profile(values, windows, tokenizer),
        windows={
            metric: column.reshape(len(windows.ids), -1).mean(-1).tolist()
            for metric, column in means.items()
        },
    )
    return measured, values


def _score(
    model: Model,
    scorer: Scorer | None,
    name: str,
    windows: Windows,
    reference: Reference | None,
    vocabulary: int,
) -> Positions:
    """One pass over the windows: each window's logits are scored and dropped. Without a
    ``scorer`` they are the reference's."""
    from quantkit.evaluation import divergence

    def scored(
        rows: Iterator[torch.Tensor], known: Callable[[int, torch.Tensor], torch.Tensor | None]
    ) -> Positions:
        found = []
        what = f"{model.id}: windows of {name}"
        for index, logits in enumerate(track(rows, what, len(windows.ids))):
            against = known(index, logits)
            found.append(
                divergence.score(
                    cut_padding(logits, vocabulary, model),
                    windows.targets(index),
                    None if against is None else against[:, :vocabulary],
                )
            )
        return divergence.join(found)

    if scorer is None:
        assert reference is not None
        own = (reference.logits(index) for index in range(len(windows.ids)))
        return scored(own, lambda _, logits: logits)
    rows = scorer.logits(windows.ids, [windows.first] * len(windows.ids))
    predicting = (logits[: windows.scored] for logits in rows)
    return scored(predicting, lambda index, _: reference.logits(index) if reference else None)


def cut_padding(logits: torch.Tensor, vocabulary: int, model: Model) -> torch.Tensor:
    """Without the rows by which a format or a checkpoint pads the vocabulary."""
    if logits.shape[1] < vocabulary:
        raise EvaluationError(
            f"{model.path}: a vocabulary of {logits.shape[1]} tokens, the tokenizer has "
            f"{vocabulary}: its weights and tokenizer belong to two models, or it must be "
            "measured against its source (--reference)"
        )
    return logits[:, :vocabulary]


def summaries(values: Positions) -> Iterator[tuple[str, Estimate]]:
    """Every metric of the text by its name; without a drift, what needs no reference."""
    from quantkit.evaluation import statistics
    from quantkit.evaluation.divergence import delta_p

    yield "ppl", statistics.perplexity(values.nll)
    yield "non_finite", statistics.Estimate(float(values.non_finite), None, values.nll.numel())
    drift = values.drift
    if drift is None:
        return
    yield "ppl_ratio", statistics.perplexity(values.nll - drift.reference_nll)
    yield "kld_mean", statistics.mean(drift.kld)
    for name, fraction in _KLD_QUANTILES.items():
        yield f"kld_{name}", statistics.quantile(drift.kld, fraction)
    yield "top1_agreement", statistics.proportion(drift.same_top)
    yield "top5_agreement", statistics.mean(drift.shared_top)
    change = delta_p(values)
    yield "delta_p_mean", statistics.mean(change)
    yield "delta_p_rms", statistics.root_mean_square(change)
    for name, fraction in _DELTA_P_QUANTILES.items():
        yield f"delta_p_{name}", statistics.quantile(change, fraction)


def _write_positions(
    found: Mapping[str, tuple[MeasuredText, Positions]], texts: Mapping[str, Windows], details: Path
) -> None:
    """A tensor ``<text>/<column>`` of shape (windows, scored positions) each."""
    from safetensors.torch import save_file

    details.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            f"{name}/{column}": values.reshape(len(texts[name].ids), -1).contiguous()
            for name, (_, positions) in found.items()
            for column, values in positions.columns().items()
        },
        details / "positions.safetensors",
    )
