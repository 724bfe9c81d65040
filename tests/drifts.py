"""Windows and answers behind a made-up ledger, so that its comparisons are real ones."""

from __future__ import annotations

import math
import random

import numpy as np

from quantkit.evaluation.compare import compare
from quantkit.evaluation.samples import Answers, Evaluated, MeasuredText
from quantkit.ledger import Ledger, OnText, Row
from quantkit.ledger.drift import Bin, Comparison, Profile, WorstPosition

WINDOWS, SCORED = 80, 255
SUBJECTS = 57


def comparisons(ledger: Ledger) -> list[Comparison]:
    """Every pair of the ledger's rows, from samples whose means are the ledger's values."""
    rows = {row.id: _evaluated(row, index) for index, row in enumerate(ledger.variants)}
    return compare(rows, tolerance=1.0)


def profile(kld: float) -> Profile:
    """Bins in the ratio that real ones have, and two places that went wrong."""
    by_position = [
        Bin(low=low, high=low + 63, n=64 * WINDOWS, kld_mean=kld * part, stderr=kld * 0.03)
        for low, part in ((256, 1.04), (320, 1.01), (384, 0.99), (448, 0.96))
    ]
    edges = (
        (0.0, 0.25, 0.8),
        (0.25, 0.5, 1.5),
        (0.5, 0.75, 1.4),
        (0.75, 0.95, 0.9),
        (0.95, 1, 0.3),
    )
    return Profile(
        by_position=by_position,
        by_confidence=[
            Bin(low=low, high=high, n=4080, kld_mean=kld * part, stderr=kld * 0.05)
            for low, high, part in edges
        ],
        worst=[
            WorstPosition(
                window=31, position=402, kld=kld * 70, delta_p=-0.81,
                before="the first line of the file.\n\nSee also the documentation of the",
                true=" import", reference_top=" import", reference_confidence=0.86,
                top=" function", confidence=0.71,
            ),
            WorstPosition(
                window=7, position=260, kld=kld * 52, delta_p=-0.44,
                before="of the 3rd argument is `None`, in which case it is",
                true=" ignored", reference_top=" ignored", reference_confidence=0.47,
                top="\n", confidence=0.63,
            ),
        ],
    )  # fmt: skip


def _evaluated(row: Row, index: int) -> Evaluated:
    texts = {name: _on_text(one, index) for name, one in row.texts.items()}
    answers = {}
    if "mmlu_acc" in row.metrics:
        accuracy = row.metrics["mmlu_acc"]
        answers["mmlu_acc"] = _answers(round(accuracy.value * accuracy.n), accuracy.n, index)
    return Evaluated(texts=texts, metrics=row.metrics, answers=answers)


def _on_text(text: OnText, index: int) -> MeasuredText:
    windows = {}
    if "ppl" in text.metrics and "kld_mean" in text.metrics:
        kld = text.metrics["kld_mean"].value
        hard = np.random.default_rng(0).normal(0, 0.25, WINDOWS)
        own = np.random.default_rng(1 + index).normal(0, 1, (2, WINDOWS))
        own -= own.mean(-1, keepdims=True)
        nll = math.log(text.metrics["ppl"].value) + hard - hard.mean()
        windows = {
            "ppl": (nll + math.sqrt(3 * kld / SCORED) * own[0]).tolist(),
            "kld_mean": (kld * (1 + 0.5 * (hard - hard.mean()) + 0.08 * own[1])).tolist(),
        }
    return MeasuredText(metrics=text.metrics, profile=text.profile, windows=windows)


def _answers(correct: int, n: int, index: int) -> Answers:
    """The reference (index 0) is right where a seed says; others flip some of its answers."""
    right = [False] * n
    for i in random.Random(0).sample(range(n), 84 if n == 282 else correct):
        right[i] = True
    rng = random.Random(index)
    picks = [0 if mark else 1 for mark in right]
    if index:
        gained = 4 * index + max(0, correct - sum(right))
        lost = gained + sum(right) - correct
        wins = rng.sample([i for i in range(n) if not right[i]], gained)
        losses = rng.sample([i for i in range(n) if right[i]], lost)
        for i in wins + losses:
            right[i] = not right[i]
            picks[i] = 0 if right[i] else 2
        for i in rng.sample([i for i in range(n) if not right[i]], 6 * index):
            picks[i] = 3
    subjects = [f"subject {i % SUBJECTS}" for i in range(n)]
    return Answers(subjects=subjects, right=right, picks=picks)
