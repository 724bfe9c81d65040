"""How many questions an early stop saves: answers of a finished run, asked again in random orders.

    python -m tests.benchmarks.early_stop RUN_DIR... [--task mmlu_dev] [--tolerance 1]
        [--questions 14042]

No model runs: ``details/<row>/<task>.json`` holds every answer. The variants of a run share one α,
as they do in ``quantkit run``. Each is stopped in many orders; the table shows how many questions
were asked on average, how often the verdict was that of all questions by the fixed-size tests, how
often it was given up where those decide, and how often it was another one, which the 5 % are about.
``--questions`` draws as many from those that there are, with replacement: what a larger task of
such questions would save.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from quantkit.evaluation import paired, sequential
from quantkit.evaluation.compare import verdict
from quantkit.evaluation.paired import Difference
from quantkit.ledger import REFERENCE
from quantkit.ledger.drift import ALPHA, Verdict

TITLES = ("variant", "questions", "drift", "of all", "asked", "saved", "same", "given up", "other")


def read_answers(path: Path) -> list[bool]:
    """Who was right by the task's first accuracy, in the order of the file."""
    answers = json.loads(path.read_text(encoding="utf-8"))
    return [next(iter(answer["right"].values())) for answer in answers]


def said(difference: Difference, comparisons: int) -> Verdict:
    """The verdict of one of several comparisons that share one α, by Bonferroni."""
    equivalent = difference.p_equivalent
    return verdict(
        difference.value,
        difference.p * comparisons,
        None if equivalent is None else equivalent * comparisons,
        lower_is_better=False,
    )


def replay(gaps: list[int], tolerance: float, comparisons: int, order: int) -> tuple[Verdict, int]:
    """The verdict in one random order, and after how many questions."""
    shuffled = gaps.copy()
    random.Random(order).shuffle(shuffled)
    asked = next(
        end
        for end in sequential.chunk_ends(len(gaps))
        if sequential.is_over(shuffled[:end], len(gaps), tolerance, comparisons)
    )
    return said(sequential.of_answers(shuffled[:asked], len(gaps), tolerance), comparisons), asked


def rows(
    run: Path, task: str, tolerance: float, orders: int, questions: int | None
) -> list[tuple[str, ...]]:
    """One line a variant of a run."""
    before = read_answers(run / "details" / REFERENCE / f"{task}.json")
    files = sorted(run.glob(f"details/*/{task}.json"))
    variants = {file.parent.name: read_answers(file) for file in files}
    del variants[REFERENCE]
    comparisons = len(variants) * (len(variants) + 1) // 2
    found = []
    for name, after in variants.items():
        gaps = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
        if questions is not None:
            gaps = random.Random(0).choices(gaps, k=questions)
        n = len(gaps)
        whole = paired.of_answers(gaps.count(-1), gaps.count(1), n, tolerance)
        wanted = said(whole, comparisons)
        ends = [replay(gaps, tolerance, comparisons, order) for order in range(orders)]
        asked = sum(count for _, count in ends) / orders
        verdicts = Counter(
            "same" if one == wanted else "given up" if one == "undecided" else "other"
            for one, _ in ends
        )
        shares = (f"{verdicts[kind] / orders:.0%}" for kind in ("same", "given up", "other"))
        found.append(
            (name, f"{n:,}", f"{100 * whole.value:+.2f}", wanted, f"{asked:,.0f}",
             f"{1 - asked / n:.0%}", *shares)
        )  # fmt: skip
    return found


def main() -> None:
    """Print a table a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--task", default="mmlu_dev")
    parser.add_argument("--tolerance", type=float, default=1.0, help="points")
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--questions", type=int)
    given = parser.parse_args()
    for run in given.runs:
        print(f"\n{run}, ±{given.tolerance:g} points, {given.orders} orders, α = {ALPHA}\n")
        print("| " + " | ".join(TITLES) + " |")
        print("| --- |" + " ---: |" * (len(TITLES) - 1))
        for row in rows(run, given.task, given.tolerance / 100, given.orders, given.questions):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
