"""What to compute for many sequences, so that neighbours which begin alike share their beginning.

The sequences are the branches of a tree of tokens, from left to right. Walking it in their order,
each branch starts from the path to the one before, so that a few shots, a question after them and
its choices after that are each computed once, however deep. Wherever the walk is interrupted, the
path to its next token is all that has to be kept: memory is that of one sequence and one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

_WORTHWHILE = 1 / 4
"""The fraction of the longer of two neighbours that they must share. Windows of one text share
their BOS at most."""


@dataclass(frozen=True)
class Run:
    """Neighbours from ``start`` to before ``stop``, and whether it pays to share."""

    start: int
    stop: int
    shared: bool


@dataclass(frozen=True)
class Part:
    """Tokens ``start`` to before ``stop`` of a sequence, which follow its own earlier ones.

    Those are on the path: computed for this sequence or for one that begins alike.
    """

    sequence: int
    start: int
    stop: int


def runs(sequences: Sequence[Sequence[int]]) -> Iterator[Run]:
    """Cut into runs of sequences that share a good part with a neighbour, and of those that don't.

    The latter are better padded and computed side by side.
    """
    pays = [
        common(one, other) >= _WORTHWHILE * max(len(one), len(other))
        for one, other in pairwise(sequences)
    ]
    either = [left or right for left, right in zip([False, *pays], [*pays, False], strict=True)]
    at = 0
    for shared, members in groupby(either[: len(sequences)]):
        count = sum(1 for _ in members)
        yield Run(at, at + count, shared)
        at += count


class Walk:
    """Through the sequences in their order, computing what each does not share with the last."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._sequences = sequences
        self._shared = [0, *(common(one, other) for one, other in pairwise(sequences))]

    def steps(self, tokens: int, parts: int | None = None) -> Iterator[list[Part]]:
        """Parts to compute together: at most ``tokens`` tokens, and ``parts`` parts, at a time.

        Every sequence has a part that ends with it, an empty one where nothing of it is new. The
        path that a step leaves is kept up to the ``start`` of the next step's first part.
        """
        step: list[Part] = []
        room = tokens
        for i, sequence in enumerate(self._sequences):
            at = self._shared[i]
            while True:
                stop = min(len(sequence), at + room)
                step.append(Part(i, at, stop))
                room -= stop - at
                at = stop
                if room == 0 or len(step) == parts:
                    yield step
                    step, room = [], tokens
                if at == len(sequence):
                    break
        if step:
            yield step

    def outputs(self, part: Part, first: Sequence[int]) -> list[int]:
        """The part's positions at which its sequence, or a later one through them, has outputs.

        ``first``: from where on each sequence has outputs.
        """
        wanted = set(range(max(part.start, first[part.sequence]), part.stop))
        reach = part.stop
        for later in range(part.sequence + 1, len(self._sequences)):
            reach = min(reach, self._shared[later])
            if reach <= part.start:
                break
            wanted.update(range(max(part.start, first[later]), reach))
        return sorted(wanted)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    if one is other or one == other:
        return len(one)
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
