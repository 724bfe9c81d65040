from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from quantkit.reports.labels import Anchor, Box, Label, place, shorten, text_width

BOUNDS = Box(74, 62, 942, 510)


def covers(box: Box, line: tuple[float, float, float, float]) -> bool:
    """Whether the line goes through the box, looked at every quarter of a pixel."""
    x1, y1, x2, y2 = line
    steps = 1 + int(4 * math.hypot(x2 - x1, y2 - y1))
    return any(
        box.left < x1 + (x2 - x1) * i / steps < box.right
        and box.top < y1 + (y2 - y1) * i / steps < box.bottom
        for i in range(steps + 1)
    )


def check(anchors: list[Anchor], labels: list[Label | None]) -> None:
    drawn = [label for label in labels if label]
    for label in drawn:
        assert label.box.inside(BOUNDS)
        assert label.box.right - label.box.left == pytest.approx(text_width(label.text))
        assert not any(label.box.overlaps(anchor.box) for anchor in anchors)
    for a, b in combinations(drawn, 2):
        assert not a.box.overlaps(b.box)
        assert a.leader is None or not covers(b.box, a.leader)
        assert b.leader is None or not covers(a.box, b.leader)


@pytest.mark.parametrize("seed", range(8))
def test_labels_of_scattered_points_touch_nothing(seed: int) -> None:
    rng = random.Random(seed)
    anchors = [
        Anchor(rng.uniform(100, 910), rng.uniform(90, 480), rng.uniform(4, 25), f"gguf-Q{i}_K_M")
        for i in range(15)
    ]
    labels = place(anchors, BOUNDS)
    assert [label.text for label in labels if label] == [anchor.text for anchor in anchors]
    check(anchors, labels)


@pytest.mark.parametrize("spread", [0.0, 3.0])
@pytest.mark.parametrize("corner", [(110, 90), (905, 90), (500, 300), (905, 485)])
def test_labels_of_points_in_one_place(corner: tuple[float, float], spread: float) -> None:
    anchors = [
        Anchor(corner[0] + spread * i, corner[1], 16, f"gptq-w4g64-{i:02d}") for i in range(6)
    ]
    labels = place(anchors, BOUNDS)
    assert None not in labels
    check(anchors, labels)


def test_a_lone_point_has_its_label_beside_it_and_a_far_label_has_a_line() -> None:
    alone = Anchor(500, 300, 10, "reference")
    (label,) = place([alone], BOUNDS)
    assert label is not None
    assert (label.leader, label.box.left) == (None, 514)
    crowd = [Anchor(500, 300, 10, f"variant-{i}") for i in range(12)]
    leaders = [label.leader for label in place(crowd, BOUNDS) if label and label.leader]
    assert leaders
    assert all(leader[:2] == (500, 300) for leader in leaders)


def test_a_label_that_fits_nowhere_is_left_out() -> None:
    anchors = [Anchor(100, 100, 5, "a" * 400), Anchor(300, 300, 5, "b")]
    labels = place(anchors, BOUNDS)
    assert labels[0] is None
    assert labels[1] is not None


def test_shorten_keeps_both_ends_on_one_line() -> None:
    assert shorten("gguf-Q8_0") == "gguf-Q8_0"
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert shorten("a\nb\x00c") == "a b c"


def test_wide_characters_count_twice() -> None:
    assert text_width("量子") == pytest.approx(text_width("abcd"))
