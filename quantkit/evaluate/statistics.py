"""Estimates with their standard errors, as llama.cpp's ``llama-perplexity`` defines them.

Errors treat tokens as independent. Tokens of one text are not, quite: the values per position are
kept (``quantkit.evaluate.evaluate``), so that two variants can be compared in pairs instead.
"""

from __future__ import annotations

import math
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


def quantile(values: torch.Tensor, fraction: float) -> Estimate:
    """The ``fraction`` quantile of ``values (n,)``, linear between its neighbours."""
    ordered = values.double().sort().values
    place = fraction * (ordered.numel() - 1)
    below = math.floor(place)
    above = min(below + 1, ordered.numel() - 1)
    value = torch.lerp(ordered[below], ordered[above], place - below)
    return Estimate(float(value), None, values.numel())
