from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from quantkit.evaluation.divergence import Positions, join, score
from quantkit.evaluation.perplexity import Windows, windows
from quantkit.evaluation.profile import CONFIDENCES, profile
from quantkit.models.tokenizer import load_tokenizer
from tests.models import VOCABULARY, write_tokenizer


@pytest.fixture(scope="module")
def cut() -> Windows:
    ids = torch.randint(3, VOCABULARY, (64,), generator=torch.Generator().manual_seed(0))
    return windows(ids.tolist(), context=32)


@pytest.fixture(scope="module")
def values(cut: Windows) -> Positions:
    """Logits from flat to steep, and a variant that strays; at one place it is quite lost."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for window in range(2):
        steepness = torch.linspace(0.5, 6, cut.scored)[:, None]
        p = torch.randn(cut.scored, VOCABULARY, generator=generator) * steepness
        q = p + 0.3 * torch.randn(p.shape, generator=generator)
        if window == 1:
            p[7, 70], q[7, 80] = 30.0, 35.0
        parts.append(score(q, cut.targets(window), p))
    return join(parts)


def test_bins_hold_every_position_once(values: Positions, cut: Windows, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    found = profile(values, cut, load_tokenizer(tmp_path))
    assert values.drift is not None
    kld = values.drift.kld.reshape(2, 15)
    # 15 scored positions, 16 to 30, in four parts.
    assert [(b.low, b.high) for b in found.by_position] == [(16, 19), (20, 23), (24, 26), (27, 30)]
    for stretch in found.by_position:
        inside = kld[:, int(stretch.low) - 16 : int(stretch.high) - 15]
        assert stretch.n == inside.numel()
        assert stretch.kld_mean == pytest.approx(inside.mean().item())
    assert sum(b.n for b in found.by_confidence) == 30
    sums = dict.fromkeys(CONFIDENCES[:-1], 0.0)
    for divergence, sure in zip(
        values.drift.kld.tolist(), values.drift.reference_confidence.tolist(), strict=True
    ):
        sums[max(edge for edge in CONFIDENCES[:-1] if edge <= sure)] += divergence
    for one in found.by_confidence:
        assert (one.kld_mean or 0.0) * one.n == pytest.approx(sums[one.low])
    assert min(b.n for b in found.by_confidence) >= 0


def test_the_worst_position_says_what_each_expected(
    values: Positions, cut: Windows, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    worst = profile(values, cut, tokenizer).worst
    assert [one.kld for one in worst] == sorted((one.kld for one in worst), reverse=True)
    assert (worst[0].window, worst[0].position) == (1, 23)
    assert worst[0].reference_top == tokenizer.decode([70])
    assert worst[0].top == tokenizer.decode([80])
    assert worst[0].true == tokenizer.decode([cut.ids[1][24]])
    assert worst[0].before == tokenizer.decode(cut.ids[1][:24])
    assert worst[0].confidence > 0.9
    assert not math.isnan(worst[0].delta_p)


def test_a_bin_without_positions_has_no_mean(cut: Windows, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    flat = torch.zeros(cut.scored, VOCABULARY)
    same = join([score(flat, cut.targets(window), flat) for window in range(2)])
    found = profile(same, cut, load_tokenizer(tmp_path))
    assert [(b.n, b.kld_mean) for b in found.by_confidence] == [(30, 0.0)] + [(0, None)] * 4
