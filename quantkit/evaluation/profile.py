"""Where on the text a variant drifted: by position, by the reference's confidence, and worst."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from quantkit.evaluation.divergence import Drift, Positions, delta_p
from quantkit.evaluation.statistics import mean
from quantkit.ledger.drift import Bin, Profile, WorstPosition

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quantkit.evaluation.perplexity import Windows

CONFIDENCES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Edges of the bins: half of a text's tokens are hard to guess, a good part nearly certain."""
_STRETCHES = 4
"""How many parts the scored positions of a window are cut into."""
_WORST = 5
_BEFORE = 24
"""Tokens of text that are shown before a position."""


def profile(values: Positions, windows: Windows, tokenizer: PreTrainedTokenizerBase) -> Profile:
    """Sum up the drift of ``values``, which are those of ``windows`` one after another."""
    drift = values.drift
    if drift is None:
        raise ValueError("scored without a reference")
    return Profile(
        by_position=_by_position(drift, windows),
        by_confidence=_by_confidence(drift),
        worst=_worst(values, drift, windows, tokenizer),
    )


def _by_position(drift: Drift, windows: Windows) -> list[Bin]:
    kld = drift.kld.reshape(len(windows.ids), windows.scored)
    edges = [round(windows.scored * part / _STRETCHES) for part in range(_STRETCHES + 1)]
    return [
        _bin(windows.first + start, windows.first + end - 1, kld[:, start:end].flatten())
        for start, end in pairwise(edges)
        if start < end
    ]


def _by_confidence(drift: Drift) -> list[Bin]:
    edges = torch.tensor(CONFIDENCES[1:-1], dtype=torch.float64)
    which = torch.bucketize(drift.reference_confidence, edges, right=True)
    return [
        _bin(low, high, drift.kld[which == index])
        for index, (low, high) in enumerate(pairwise(CONFIDENCES))
    ]


def _bin(low: float, high: float, kld: torch.Tensor) -> Bin:
    if not len(kld):
        return Bin(low=low, high=high, n=0, kld_mean=None, stderr=None)
    found = mean(kld)
    return Bin(low=low, high=high, n=found.n, kld_mean=found.value, stderr=found.stderr)


def _worst(
    values: Positions, drift: Drift, windows: Windows, tokenizer: PreTrainedTokenizerBase
) -> list[WorstPosition]:
    found = []
    changes = delta_p(values)
    for index in drift.kld.topk(min(_WORST, len(drift.kld))).indices.tolist():
        window, place = divmod(index, windows.scored)
        position = windows.first + place
        ids = windows.ids[window]
        found.append(
            WorstPosition(
                window=window,
                position=position,
                kld=float(drift.kld[index]),
                before=tokenizer.decode(ids[max(0, position + 1 - _BEFORE) : position + 1]),
                true=tokenizer.decode([ids[position + 1]]),
                delta_p=float(changes[index]),
                reference_top=tokenizer.decode([int(drift.reference_top[index])]),
                reference_confidence=float(drift.reference_confidence[index]),
                top=tokenizer.decode([int(drift.top[index])]),
                confidence=float(drift.confidence[index]),
            )
        )
    return found
