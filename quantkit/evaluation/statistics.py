"""Estimates with their standard errors, as llama.cpp's ``llama-perplexity`` defines them.

Errors treat tokens as independent. Tokens of one text are not, quite: whether two models differ is
tested over whole windows instead (``quantkit.evaluation.paired``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error (None where it has no simple one) and its sample size."""

    value: float
    stderr: float | None
    n: int


def mean(values: torch.Tensor) -> Estimate:
    """Mean ± s/√n of ``values (n,)``, with s the sample standard deviation (n - 1)."""
    values = values.double()
    n = values.numel()
    stderr = float(values.std()) / math.sqrt(n) if n > 1 else None
    return Estimate(float(values.mean()), stderr, n)


def perplexity(nll: torch.Tensor) -> Estimate:
    """exp(mean nll) of ``nll (n,)`` in nats; by the delta method its error is ppl x that of the
    mean."""
    average = mean(nll)
    ppl = math.exp(average.value)
    return Estimate(ppl, None if average.stderr is None else ppl * average.stderr, average.n)


def proportion(hits: torch.Tensor) -> Estimate:
    """Share of ``hits (n,) bool`` that are true ± √(p(1 - p)/(n - 1))."""
    return mean(hits)


def root_mean_square(values: torch.Tensor) -> Estimate:
    """√(mean of squares) of ``values (n,)``; by the delta method its error is that of the mean
    over 2 RMS."""
    squares = mean(values.double().square())
    rms = math.sqrt(squares.value)
    stderr = squares.stderr / (2 * rms) if squares.stderr is not None and rms else squares.stderr
    return Estimate(rms, stderr, squares.n)


def quantile(values: torch.Tensor, fraction: float) -> Estimate:
    """The ``fraction`` quantile of ``values (n,)``, linear between its neighbours."""
    ordered = values.double().sort().values
    place = fraction * (ordered.numel() - 1)
    below = math.floor(place)
    above = min(below + 1, ordered.numel() - 1)
    value = torch.lerp(ordered[below], ordered[above], place - below)
    return Estimate(float(value), None, values.numel())


def clustered_mean(clusters: Sequence[torch.Tensor]) -> Estimate:
    """Mean of all values of ``clusters``, each ``(n_c,)``; its size counts clusters.

    Values of one cluster may depend on each other, and clusters differ in size: the mean is a ratio
    of two sums over m clusters, with the error √(m/(m - 1) Σ_c (Σ_i (x_ci - mean))²) / Σ n_c
    (Cochran 1977, *Sampling Techniques*, section 6.3). With one value each it is that of ``mean``.
    """
    values = torch.cat([cluster.double() for cluster in clusters])
    value = float(values.mean())
    m = len(clusters)
    if m < 2:
        return Estimate(value, None, m)
    sums = torch.stack([(cluster.double() - value).sum() for cluster in clusters])
    spread = math.sqrt(m / (m - 1) * float(sums.square().sum()))
    return Estimate(value, spread / values.numel(), m)
