"""The text's metrics: one pass over its windows, each scored against the reference and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.engines.base import label
from quantkit.errors import EvaluationError
from quantkit.evaluate.samples import METRICS_VERSION, Evaluated
from quantkit.ledger import REFERENCE, Metric
from quantkit.progress import track

if TYPE_CHECKING:
    import torch

    from quantkit.engines.base import Engine
    from quantkit.evaluate import EvaluationPlan
    from quantkit.evaluate.divergence import Positions
    from quantkit.evaluate.perplexity import Windows
    from quantkit.evaluate.reference import Reference
    from quantkit.evaluate.statistics import Estimate
    from quantkit.variant import Model

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


def measure_text(
    model: Model,
    engine: Engine,
    windows: Windows,
    reference: Reference | None,
    plan: EvaluationPlan,
    details: Path | None,
    *,
    anew: bool = False,
) -> Evaluated:
    """Perplexity, and the drift from a ``reference`` that was built on the same windows.

    ``anew``: run the model even where it is the reference's own, whose logits are known. Raise
    EvaluationError for another text, another vocabulary, or non-finite logits.
    """
    from quantkit.evaluate.profile import profile

    if reference is not None and reference.windows != windows:
        raise EvaluationError("the reference was built on other tokens; build it on the plan's")
    vocabulary = len(plan.tokenizer)
    if reference is not None:
        # Some tokenizers know more tokens than the model has rows.
        vocabulary = min(vocabulary, reference.vocabulary)
    own = reference is not None and reference.is_of(model)
    values = _score(model, engine, windows, reference, vocabulary, run=anew or not own)
    if values.non_finite:
        raise EvaluationError(
            f"{model.path}: non-finite logits at {values.non_finite} of {values.nll.numel()} "
            "scored positions; nothing is computed from the rest"
        )
    if details is not None:
        _write_positions(values, len(windows.ids), details)
    version = reference.engine if reference and own else label(engine)
    protocol = {
        **windows.protocol(),
        "vocabulary": vocabulary,
        "metrics_version": METRICS_VERSION,
    }
    drift = protocol | {"reference_sha256": reference.source if reference else None}
    metrics = {
        name: Metric(
            value=estimate.value,
            stderr=estimate.stderr,
            n=estimate.n,
            reference=None if name in _ABSOLUTE else REFERENCE,
            protocol=protocol if name in _ABSOLUTE else drift,
            engine=version,
        )
        for name, estimate in summaries(values)
    }
    means = {"ppl": values.nll} | ({"kld_mean": values.drift.kld} if values.drift else {})
    return Evaluated(
        metrics=metrics,
        profile=None if reference is None or own else profile(values, windows, plan.tokenizer),
        windows={
            name: column.reshape(len(windows.ids), -1).mean(-1).tolist()
            for name, column in means.items()
        },
    )


def _score(
    model: Model,
    engine: Engine,
    windows: Windows,
    reference: Reference | None,
    vocabulary: int,
    *,
    run: bool,
) -> Positions:
    """One pass over the windows: each window's logits are scored and dropped. Unless ``run``, they
    are the reference's."""
    from quantkit.evaluate import divergence

    def scored(
        rows: Iterator[torch.Tensor], known: Callable[[int, torch.Tensor], torch.Tensor | None]
    ) -> Positions:
        found = []
        for index, logits in enumerate(track(rows, f"{model.id}: windows", len(windows.ids))):
            against = known(index, logits)
            found.append(
                divergence.score(
                    cut_padding(logits, vocabulary, model),
                    windows.targets(index),
                    None if against is None else against[:, :vocabulary],
                )
            )
        return divergence.join(found)

    if reference is not None and not run:
        own = (reference.logits(index) for index in range(len(windows.ids)))
        return scored(own, lambda _, logits: logits)
    with engine.scorer(model, windows.context) as scorer:
        rows = scorer.logits(windows.ids, [windows.first] * len(windows.ids))
        predicting = (logits[: windows.scored] for logits in rows)
        return scored(predicting, lambda index, _: reference.logits(index) if reference else None)


def cut_padding(logits: torch.Tensor, vocabulary: int, model: Model) -> torch.Tensor:
    """Without the rows by which a format or a checkpoint pads the vocabulary."""
    if logits.shape[1] < vocabulary:
        raise EvaluationError(
            f"{model.path}: a vocabulary of {logits.shape[1]} tokens, the tokenizer has "
            f"{vocabulary}: its weights and tokenizer are of two models, or it is to be measured "
            "against its source (--reference)"
        )
    return logits[:, :vocabulary]


def summaries(values: Positions) -> Iterator[tuple[str, Estimate]]:
    """Every metric of the text by its name; without a drift, what needs no reference."""
    from quantkit.evaluate import statistics
    from quantkit.evaluate.divergence import delta_p

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


def _write_positions(values: Positions, windows: int, details: Path) -> None:
    from safetensors.torch import save_file

    details.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            name: column.reshape(windows, -1).contiguous()
            for name, column in values.columns().items()
        },
        details / "positions.safetensors",
    )
