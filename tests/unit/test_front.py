"""The Pareto front against the definition, point by point and corner by corner."""

from __future__ import annotations

import random
from itertools import product

from quantkit.ledger import OnText
from quantkit.recommendation.front import Placed, front, on_front
from tests import ledgers, loads
from tests.ledger_rows import DOCS, LLAMACPP, VLLM


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """As fast and as near, and better in one."""
    return a[0] >= b[0] and a[1] <= b[1] and a != b


def test_the_line_is_the_front_by_its_definition() -> None:
    """On a coarse grid too, where values repeat."""
    rng = random.Random(0)
    for _ in range(300):
        fine = rng.random() < 0.5
        points = [
            (rng.random(), rng.random()) if fine else (rng.randint(0, 3), rng.randint(0, 3))
            for _ in range(rng.randint(0, 12))
        ]
        assert on_front(points) == [
            not any(dominates(other, point) for other in points) for point in points
        ]


def test_standings_are_those_of_all_corners_of_the_intervals() -> None:
    """Beaten: by one other, wherever both lie in their intervals. On the front: by none, wherever.
    Drifts here have no paired test, so their intervals count."""
    seen = set()
    for seed in range(40):
        placed = front(_random_ledger(random.Random(seed)), 4)
        for one in placed:
            others = [other for other in placed if other is not one]
            sure = [all(_dominates_at_corners(other, one)) for other in others]
            possible = [any(_dominates_at_corners(other, one)) for other in others]
            expected = "dominated" if any(sure) else "undecided" if any(possible) else "front"
            assert one.standing == expected
            assert len(one.beaten_by) == sum(sure)
            seen.add(one.standing)
    assert seen == {"front", "undecided", "dominated"}


def _dominates_at_corners(a: Placed, b: Placed) -> list[bool]:
    corners = product(
        (a.throughput.low, a.throughput.high), (a.divergence.low, a.divergence.high),
        (b.throughput.low, b.throughput.high), (b.divergence.low, b.divergence.high),
    )  # fmt: skip
    return [dominates((s, d), (t, e)) for s, d, t, e in corners]


def _random_ledger(rng: random.Random) -> ledgers.Ledger:
    found = ledgers.quickstart()
    rows = []
    for index in range(6):
        like = found.variants[1]
        kld = (
            like.texts[DOCS]
            .metrics["kld_mean"]
            .model_copy(
                update={"value": rng.uniform(0.01, 0.1), "stderr": rng.uniform(0.0005, 0.008)}
            )
        )
        rate = rng.uniform(50, 200)
        rates = [rate * (1 + rng.uniform(-0.03, 0.03)) for _ in range(3)]
        rows.append(
            like.model_copy(
                update={
                    "id": f"v{index}",
                    "texts": {DOCS: OnText(metrics={"kld_mean": kld})},
                    "bench": [loads.bench(LLAMACPP, 4, rates)],
                }
            )
        )
    reference = found.variants[0].model_copy(update={"bench": []})
    return found.model_copy(update={"variants": [reference, *rows], "comparisons": []})


def test_one_variant_on_two_engines_has_one_drift() -> None:
    found = ledgers.quickstart()
    both = found.variants[2].model_copy(
        update={
            "bench": [
                loads.bench(LLAMACPP, 4, [99, 100, 101]),
                loads.bench(VLLM, 4, [149, 150, 151]),
            ]
        }
    )
    placed = front(found.model_copy(update={"variants": [found.variants[0], both]}), 4)
    assert {one.candidate.key: one.standing for one in placed} == {
        ("reference", "vllm"): "front",
        ("gguf-Q4_K_M", "llamacpp"): "dominated",
        ("gguf-Q4_K_M", "vllm"): "front",
    }
    assert [one.key for one in placed[1].beaten_by] == [("gguf-Q4_K_M", "vllm")]


def test_the_front_of_the_demo() -> None:
    placed = {one.candidate.row.id: one for one in front(ledgers.quickstart(), 4)}
    # Intervals are 6 % to each side: Q8_0 to Q4_K_M to Q4_0 overlap, each slower and nearer.
    assert {id_: one.standing for id_, one in placed.items()} == {
        "reference": "front",
        "gguf-Q8_0": "front",
        "gguf-Q4_K_M": "undecided",
        "gguf-Q4_0": "undecided",
        "gptq-w4g64": "dominated",
        "awq-w4g64": "dominated",
    }
    assert [id_ for id_, one in placed.items() if one.on_line] == [
        "reference", "gguf-Q8_0", "gguf-Q4_K_M", "gguf-Q4_0",
    ]  # fmt: skip
    beaten = placed["gptq-w4g64"].beaten_by
    # 101.7 is below 118 by more than the noise of both, and below 131.4.
    assert {one.row.id for one in beaten} == {"gguf-Q8_0", "gguf-Q4_K_M"}
