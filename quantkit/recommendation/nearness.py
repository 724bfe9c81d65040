"""How far a row is from the reference over all texts, and which of two is nearer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal

from quantkit.ledger import REFERENCE, Ledger, Metric, OnText, Row
from quantkit.recommendation.interval import Interval, of_error

Drift = Literal["worst", "mean"]
"""Where there are several texts, a row counts by the one on which it drifted most, or by their
mean."""


def divergences(texts: Mapping[str, OnText]) -> dict[str, Metric]:
    """Mean KL divergence from the reference on each text; empty where any is not a number."""
    found = {text: one.metrics["kld_mean"] for text, one in texts.items()
             if "kld_mean" in one.metrics}  # fmt: skip
    return found if all(math.isfinite(one.value) for one in found.values()) else {}


def worst_text(texts: Mapping[str, OnText]) -> str | None:
    """The text with the greatest divergence; None where there is none."""
    found = divergences(texts)
    return max(found, key=lambda text: found[text].value, default=None)


def divergence(row: Row, drift: Drift = "worst") -> Interval | None:
    """Over all texts, nats; None where it was not measured.

    Of the worst, both ends are the largest of all texts: below a bound is what is below it on every
    text, above it what is above it on any. Errors of different texts are independent.
    """
    if row.id == REFERENCE:
        return Interval.exactly(0.0)
    metrics = list(divergences(row.texts).values())
    if not metrics:
        return None
    if drift == "mean":
        return of_error(*mean(metrics))
    ones = [of_error(one.value, one.stderr) for one in metrics]
    return Interval(
        max(one.value for one in ones), max(one.low for one in ones), max(one.high for one in ones)
    )


def mean(metrics: Collection[Metric]) -> tuple[float, float | None]:
    """The mean of a metric over texts, equally weighted, with its standard error."""
    n = len(metrics)
    errors = [one.stderr for one in metrics if one.stderr is not None]
    stderr = math.hypot(*errors) / n if len(errors) == n else None
    return math.fsum(one.value for one in metrics) / n, stderr


class Nearness:
    """Which of two rows is nearer to the reference, as far as a ledger can tell."""

    def __init__(self, ledger: Ledger, drift: Drift = "worst") -> None:
        self._drift = drift
        self._equivalent = _equivalent(ledger)
        self._pairs: dict[tuple[str, str, str | None], float] = {}
        for one in ledger.comparisons:
            if one.measure == "kld_mean":
                gap = one.drift if one.apart else 0.0
                self._pairs[one.a, one.b, one.text] = gap
                self._pairs[one.b, one.a, one.text] = -gap

    def better(self, a: Row, b: Row) -> bool:
        """Whether ``a`` is nearer, and the two are not both equivalent to the reference."""
        return self.nearer(a, b) and not {a.id, b.id} <= self._equivalent

    def nearer(self, a: Row, b: Row) -> bool:
        """Whether the divergence of ``a`` is smaller beyond doubt.

        By paired tests: of the worst text on that of ``a``, as ``b`` at its own worst is no nearer
        than there; of the mean on every text. Where no test compared them, or there are several
        texts, also by intervals that do not meet.
        """
        if a.id == b.id:
            return False
        texts = [worst_text(a.texts)] if self._drift == "worst" else list(divergences(a.texts))
        gaps = [self._pairs.get((a.id, b.id, text)) for text in texts]
        if gaps and all(gap is not None and gap > 0 for gap in gaps):
            return True
        if len(divergences(a.texts)) == 1 and None not in gaps:
            return False
        one, other = divergence(a, self._drift), divergence(b, self._drift)
        return bool(one and other and one.high < other.low)


def _equivalent(ledger: Ledger) -> set[str]:
    """Whose perplexity is equivalent to the reference's, within the run's tolerance, on every
    text."""
    pairs = [one for one in ledger.comparisons if one.measure == "ppl" and one.a == REFERENCE]
    unlike = {one.b for one in pairs if one.verdict != "equivalent"}
    return {one.b for one in pairs} - unlike
