"""Labels of points in a chart, placed so that none covers another label or a point."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

FONT_SIZE = 12.5
_ADVANCE = 0.61
"""Em per character in monospaced system fonts: 0.55 (Consolas) to 0.602 (Menlo, DejaVu)."""
_GAP = 4.0
_LEADER_FROM = 14.0
"""Labels farther than this from their point are tied to it by a line."""
_ATTEMPTS = 8
_STEPS = 40
"""How many half lines up and down a label may stand from its point."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether they share area; touching is not overlapping."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        """Whether no part of it is outside ``other``."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the rectangle that is nearest to ``(x, y)``."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


@dataclass(frozen=True)
class Anchor:
    """A point that wants a label: its centre, the radius of its marker, the text."""

    x: float
    y: float
    radius: float
    text: str

    @property
    def box(self) -> Box:
        """What the marker covers."""
        r = self.radius
        return Box(self.x - r, self.y - r, self.x + r, self.y + r)


@dataclass(frozen=True)
class Label:
    """Where a label went; ``leader`` is the line to its point, where it is not beside it."""

    text: str
    box: Box
    leader: tuple[float, float, float, float] | None


def text_width(text: str, font_size: float = FONT_SIZE) -> float:
    """Pixels that monospaced ``text`` takes; East Asian wide characters count twice."""
    cells = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
    return cells * _ADVANCE * font_size


def shorten(text: str, cells: int = 24) -> str:
    """``text`` on one line, its middle cut out where it is longer than ``cells`` characters."""
    line = "".join(char if char.isprintable() else " " for char in text)
    if len(line) <= cells:
        return line
    head = (cells - 1) // 2
    return f"{line[:head]}…{line[head + 1 - cells :]}"


def place(anchors: Sequence[Anchor], bounds: Box) -> list[Label | None]:
    """One label an anchor, in the same order; greedy, nearest free place first.

    A place is free where it lies inside ``bounds``, touches no marker and no label, and no leader
    crosses a label. None where a chart is too full for that.
    """
    # The most crowded points choose first, while there is room near them.
    order = sorted(range(len(anchors)), key=lambda i: _distance_to_others(anchors, i))
    best: list[Label | None] = [None] * len(anchors)
    for attempt in range(_ATTEMPTS):
        # A ring of labels around points in one place shuts the way out; columns leave it open.
        found = _place_in_order(anchors, bounds, order, columns_only=attempt % 2 == 1)
        if found.count(None) < best.count(None):
            best = found
        if None not in found:
            break
        order.sort(key=lambda i: found[i] is not None)  # who found no place chooses first
    return best


def _place_in_order(
    anchors: Sequence[Anchor], bounds: Box, order: Sequence[int], *, columns_only: bool
) -> list[Label | None]:
    markers = [anchor.box for anchor in anchors]
    placed: list[Label | None] = [None] * len(anchors)
    for index in order:
        others = [label for label in placed if label]
        for label in _candidates(anchors[index], columns_only):
            if label.box.inside(bounds) and _free(label, markers, others):
                placed[index] = label
                break
    return placed


def _distance_to_others(anchors: Sequence[Anchor], index: int) -> float:
    here = anchors[index]
    others = (a for i, a in enumerate(anchors) if i != index)
    return min((math.hypot(here.x - a.x, here.y - a.y) for a in others), default=0.0)


def _candidates(anchor: Anchor, columns_only: bool) -> list[Label]:
    """Beside the point, under and over it, then in columns at both sides, nearest first."""
    width, height = text_width(anchor.text), FONT_SIZE * 1.3
    beside, above = anchor.radius + _GAP, anchor.radius + _GAP + height / 2
    middles = [] if columns_only else [(0.0, -above), (0.0, above)]
    for gap in (0.0, 14.0, 34.0, 64.0, 104.0, 154.0, 214.0, 284.0):
        for step in range(-_STEPS, _STEPS + 1):
            for side in (1, -1):
                x = side * (beside + gap + width / 2)
                middles.append((x, step * height / 2))
    found = []
    for x, y in middles:
        left, top = anchor.x + x - width / 2, anchor.y + y - height / 2
        box = Box(left, top, left + width, top + height)
        end = box.nearest(anchor.x, anchor.y)
        away = math.hypot(end[0] - anchor.x, end[1] - anchor.y) - anchor.radius
        leader = (anchor.x, anchor.y, *end) if away > _LEADER_FROM else None
        # Of places as near as each other, that to the right and at the same height reads best.
        found.append((away + 0.2 * abs(y) + (x < 0), Label(anchor.text, box, leader)))
    return [label for _, label in sorted(found, key=lambda pair: pair[0])]


def _free(label: Label, markers: list[Box], placed: list[Label]) -> bool:
    roomy = Box(label.box.left - 3, label.box.top - 1, label.box.right + 3, label.box.bottom + 1)
    return not any(roomy.overlaps(box) for box in markers) and not any(
        roomy.overlaps(other.box)
        or _crosses(other.leader, roomy)
        or _crosses(label.leader, other.box)
        for other in placed
    )


def _crosses(leader: tuple[float, float, float, float] | None, box: Box) -> bool:
    """Whether any of the line is in the box: what of it each pair of sides lets through."""
    if leader is None:
        return False
    x1, y1, x2, y2 = leader
    first, last = 0.0, 1.0
    for start, step, low, high in (
        (x1, x2 - x1, box.left, box.right),
        (y1, y2 - y1, box.top, box.bottom),
    ):
        if step == 0:
            if not low < start < high:
                return False
            continue
        enter, leave = sorted(((low - start) / step, (high - start) / step))
        first, last = max(first, enter), min(last, leave)
    return first < last
