"""KL divergence from a reference, top-1 agreement and likelihood, position by position."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ROWS = 32
"""Positions at a time: the temporaries of one block fit in a CPU's cache, or nearly."""


@dataclass(frozen=True)
class Positions:
    """What one pass over the scored positions gave; without a reference, ``nll`` only.

    ``nll``, ``kld``: ``(n,) float64``, nats; ``same_top``: ``(n,) bool``. Values at positions
    that are not ``finite (n,) bool`` mean nothing.
    """

    nll: torch.Tensor
    finite: torch.Tensor
    kld: torch.Tensor | None = None
    same_top: torch.Tensor | None = None

    @property
    def non_finite(self) -> int:
        """Positions at which a logit of either model is NaN or infinite."""
        return int((~self.finite).sum())


def score(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None
) -> Positions:
    """Score ``logits (T, V) float32`` against ``targets (T,)`` and ``reference (T, V) float32``.

    ``kld`` is D(reference ‖ model) = Σ p ln(p/q) over all V tokens, for each position.
    """
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

    def column(values: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present) if present else None

    return Positions(
        torch.cat([part.nll for part in parts]),
        torch.cat([part.finite for part in parts]),
        column([part.kld for part in parts]),
        column([part.same_top for part in parts]),
    )


def _score_block(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None
) -> Positions:
    _, _, norm = _exponentials(logits)
    nll = norm - logits.gather(-1, targets[:, None])[:, 0].double()
    finite = logits.isfinite().all(-1)
    if reference is None:
        return Positions(nll, finite)
    weights, total, reference_norm = _exponentials(reference)
    # Σ p ln(p/q) = Σ p (a - b) - (ln Σ e^a - ln Σ e^b). The normalisers stay in float64: rounded
    # to float32 (1e-6 at ln Σ = 20) they would cover the KLD of a good 8-bit model. For equal
    # logits every term is exactly 0.
    gap = weights.mul_(reference - logits).sum(-1, dtype=torch.float64) / total
    return Positions(
        nll,
        finite & reference.isfinite().all(-1),
        gap - (reference_norm - norm),
        logits.argmax(-1) == reference.argmax(-1),
    )


def _exponentials(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """e^(a - max) in float32, its sum and ln Σ e^a in float64, by row."""
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()
    total = weights.sum(-1, dtype=torch.float64)
    return weights, total, top[:, 0].double() + total.log()
