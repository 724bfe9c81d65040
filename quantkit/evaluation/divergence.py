"""How far a model's next-token distributions are from a reference's, position by position."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

TOP = 5
"""How many of the most likely tokens are compared."""

_ROWS = 32
"""Positions at a time: the temporaries of one block fit in a CPU's cache, or nearly."""


@dataclass(frozen=True)
class Drift:
    """A model against the reference at every scored position; each ``(n,)``.

    ``kld`` float64, nats: D(reference ‖ model) = Σ p ln(p/q) over the vocabulary.
    ``reference_nll`` float64, nats: of the true token. ``top`` and ``reference_top`` int64: the
    most likely token; ``confidence`` and ``reference_confidence`` float64: its probability.
    ``shared_top`` float64: which share of the reference's ``TOP`` likeliest tokens the model has
    among its own ``TOP``.
    """

    kld: torch.Tensor
    reference_nll: torch.Tensor
    top: torch.Tensor
    reference_top: torch.Tensor
    confidence: torch.Tensor
    reference_confidence: torch.Tensor
    shared_top: torch.Tensor

    @property
    def same_top(self) -> torch.Tensor:
        """``(n,) bool``: whether both find the same token the most likely."""
        return self.top == self.reference_top


@dataclass(frozen=True)
class Positions:
    """What one pass over the scored positions gave; without a reference, no ``drift``.

    ``nll (n,) float64``: of the true token, nats. Values at positions that are not
    ``finite (n,) bool`` mean nothing.
    """

    nll: torch.Tensor
    finite: torch.Tensor
    drift: Drift | None = None

    @property
    def non_finite(self) -> int:
        """Positions at which a logit of either model is NaN or infinite."""
        return int((~self.finite).sum())

    def columns(self) -> dict[str, torch.Tensor]:
        """Everything by name, for a file."""
        found = {"nll": self.nll}
        if self.drift is not None:
            found |= {field.name: getattr(self.drift, field.name) for field in fields(Drift)}
        return found


def delta_p(values: Positions) -> torch.Tensor:
    """``(n,) float64``: probability of the true token, the model's minus the reference's."""
    if values.drift is None:
        raise ValueError("scored without a reference")
    return (-values.nll).exp() - (-values.drift.reference_nll).exp()


def score(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None
) -> Positions:
    """Score ``logits (T, V) float32`` against ``targets (T,)`` and ``reference (T, V) float32``."""
    blocks = [
        _score_block(
            logits[start : start + _ROWS],
            targets[start : start + _ROWS],
            None if reference is None else reference[start : start + _ROWS],
        )
        for start in range(0, len(targets), _ROWS)
    ]
    return join(blocks)


def join(parts: list[Positions]) -> Positions:
    """One after another."""
    drifts = [part.drift for part in parts if part.drift is not None]
    columns = [
        torch.cat([getattr(drift, field.name) for drift in drifts])
        for field in fields(Drift)
        if drifts
    ]
    return Positions(
        torch.cat([part.nll for part in parts]),
        torch.cat([part.finite for part in parts]),
        Drift(*columns) if columns else None,
    )


@dataclass(frozen=True)
class _Rows:
    """The softmax of a block of logits, unfinished: ``weights / total`` are probabilities."""

    weights: torch.Tensor
    """``(T, V) float32``: e^(a - max)."""
    total: torch.Tensor
    """``(T,) float64``: the sum of the weights; that of the greatest logit is 1."""
    norm: torch.Tensor
    """``(T,) float64``: ln Σ e^a."""
    top: torch.Tensor
    """``(T, TOP) int64``, likeliest first."""

    @classmethod
    def of(cls, logits: torch.Tensor) -> _Rows:
        values, top = logits.topk(min(TOP, logits.shape[-1]), -1)
        weights = (logits - values[:, :1]).exp_()
        total = weights.sum(-1, dtype=torch.float64)
        return cls(weights, total, values[:, 0].double() + total.log(), top)

    def nll(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.norm - logits.gather(-1, targets[:, None])[:, 0].double()


def _score_block(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None
) -> Positions:
    model = _Rows.of(logits)
    nll = model.nll(logits, targets)
    finite = logits.isfinite().all(-1)
    if reference is None:
        return Positions(nll, finite)
    known = _Rows.of(reference)
    # Σ p ln(p/q) = Σ p (a - b) - (ln Σ e^a - ln Σ e^b). The normalisers stay in float64: rounded
    # to float32 (1e-6 at ln Σ = 20) they would cover the KLD of a good 8-bit model. For equal
    # logits every term is exactly 0.
    gap = known.weights.mul_(reference - logits).sum(-1, dtype=torch.float64) / known.total
    shared = (known.top[:, :, None] == model.top[:, None, :]).any(-1)
    drift = Drift(
        kld=gap - (known.norm - model.norm),
        reference_nll=known.nll(reference, targets),
        top=model.top[:, 0],
        reference_top=known.top[:, 0],
        confidence=1 / model.total,
        reference_confidence=1 / known.total,
        shared_top=shared.double().mean(-1),
    )
    return Positions(nll, finite & reference.isfinite().all(-1), drift)
