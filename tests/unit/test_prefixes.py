from __future__ import annotations

import random

import pytest

from quantkit.engines.prefixes import Part, Run, Walk, common, runs


def _walk(sequences: list[list[int]], tokens: int, parts: int | None) -> list[tuple[int, ...]]:
    """What an engine computes, by the letter: each token as the whole prefix that it ends.

    Checks on the way that the path holds what each part follows, and that little more is kept.
    """
    computed: list[tuple[int, ...]] = []
    ended: list[int] = []
    path: list[int] = []
    for step in Walk(sequences).steps(tokens, parts):
        path = path[: step[0].start]
        assert sum(part.stop - part.start for part in step) <= tokens
        assert len(step) <= (parts or len(step))
        for part in step:
            sequence = sequences[part.sequence]
            assert part.start <= len(path)
            path = path[: part.start]
            assert path == sequence[: part.start]
            for token in sequence[part.start : part.stop]:
                path.append(token)
                computed.append(tuple(path))
            if part.stop == len(sequence):
                ended.append(part.sequence)
    assert ended == list(range(len(sequences)))
    return computed


@pytest.mark.parametrize("seed", range(30))
def test_every_prefix_is_computed_once(seed: int) -> None:
    """Against the set of all prefixes of all sequences, which is what there is to compute."""
    rng = random.Random(seed)
    sequences = [rng.choices(range(3), k=rng.randint(1, 12)) for _ in range(rng.randint(1, 25))]
    sequences.sort()
    expected = {tuple(s[:end]) for s in sequences for end in range(1, len(s) + 1)}
    for tokens, parts in [(1, None), (5, None), (7, 2), (1000, None), (1000, 1)]:
        computed = _walk(sequences, tokens, parts)
        assert len(computed) == len(set(computed))
        assert set(computed) == expected


def test_any_order_is_computed_rightly_if_not_once() -> None:
    rng = random.Random(0)
    sequences = [rng.choices(range(2), k=rng.randint(1, 9)) for _ in range(40)]
    computed = _walk(sequences, 6, 4)
    assert set(computed) == {tuple(s[:end]) for s in sequences for end in range(1, len(s) + 1)}
    assert len(computed) < sum(map(len, sequences))


def test_a_step_by_hand() -> None:
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 5], [9]]
    assert list(Walk(sequences).steps(5)) == [
        [Part(0, 0, 4), Part(1, 3, 4)],
        [Part(2, 4, 4), Part(3, 0, 1)],
    ]
    assert list(Walk(sequences).steps(3, parts=1)) == [
        [Part(0, 0, 3)],
        [Part(0, 3, 4)],
        [Part(1, 3, 4)],
        [Part(2, 4, 4)],
        [Part(3, 0, 1)],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_outputs_are_computed_where_some_sequence_asks_for_them(seed: int) -> None:
    rng = random.Random(seed)
    sequences = sorted(rng.choices(range(2), k=rng.randint(1, 9)) for _ in range(20))
    first = [rng.randrange(len(s)) for s in sequences]
    expected = {tuple(s[: t + 1]) for s, f in zip(sequences, first, strict=True)
                for t in range(f, len(s))}  # fmt: skip
    walk = Walk(sequences)
    found = [
        tuple(sequences[part.sequence][: position + 1])
        for step in walk.steps(4)
        for part in step
        for position in walk.outputs(part, first)
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_windows_that_share_their_bos_alone_are_not_shared() -> None:
    windows = [[1, *range(10 * i, 10 * i + 63)] for i in range(5)]
    assert list(runs(windows)) == [Run(0, 5, shared=False)]


def test_runs_by_hand() -> None:
    shots = list(range(100))
    sequences = [[7] * 50, [*shots, 1, 2], [*shots, 3], [*shots, 3], [8] * 9, [9] * 9, [5], [5]]
    assert list(runs(sequences)) == [
        Run(0, 1, shared=False),
        Run(1, 4, shared=True),
        Run(4, 6, shared=False),
        Run(6, 8, shared=True),
    ]
    assert list(runs([])) == []


def test_common() -> None:
    assert common([1, 2, 3], (1, 2, 3)) == 3
    assert common([1, 2, 3], [1, 2]) == 2
    assert common([1, 2, 3], [1, 3, 3]) == 1
    assert common([], [1]) == 0
