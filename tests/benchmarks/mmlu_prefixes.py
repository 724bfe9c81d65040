"""MMLU 5-shot with shared beginnings, beside lm-eval's own ``hf`` model and a naive llama.cpp.

    python -m tests.benchmarks.mmlu_prefixes [--mmlu DIR] [--pairs 10] [--questions 100]

Each pair is the first questions of one subject (drawn by seed) of the demo model, as a whole call:
the task with its data, the tokens, loading the model, the answers. Both sides run in this process,
in turn, in alternating order, with the same threads and in float32. ``hf`` runs with the best of
its batch sizes, tried out beforehand; it computes the choices of a question at once, and everything
else again. llama.cpp's other side is given one question at a time.

Answers are compared by the choice that is the likeliest. Where both sides differ, the gap is
printed: how much less likely, in nats, the one's pick is to the other; near ties are expected.

With `--keep FILE` pairs are kept and not done again, and the totals are over all that are there.
`--picks` leaves the seconds out: for a machine that does something else as well.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

from quantkit.engines.base import Scorer
from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.engines.transformers import TransformersScorer
from quantkit.evaluation.questions import csv_questions
from quantkit.evaluation.tasks import load_task, run_task
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from quantkit.system.threads import spin_briefly

SHOTS = 5
CONTEXT = 2048
BATCH_SIZES = (1, 4, 8, 16)
TRIED = 16
"""Questions for each batch size of ``hf``."""
MMLU = Path(__file__).parents[3] / "shared" / "data" / "mmlu"

TITLES = (
    "| subject | quantkit, s | other, s | times faster | CPU s | CPU s | less | same picks |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)

Likelihoods = list[list[float]]
"""Of each question's choices, in nats."""
Side = Callable[[Path, int], Likelihoods]
"""Answers at most so many questions of a task."""


@dataclass(frozen=True)
class Cost:
    """Of one call: wall seconds, and those of all cores in user and kernel."""

    wall: float
    cpu: float


class OneByOne(Scorer):
    """A scorer that is given one sequence at a time, and equal neighbours once."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def logits(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """See ``Scorer.logits``."""
        last: tuple[Sequence[int], int] | None = None
        for sequence, start in zip(sequences, first, strict=True):
            if last != (sequence, start):
                last = (sequence, start)
                (rows,) = self._scorer.logits([sequence], [start])
            yield rows


@contextmanager
def one_by_one(opened: AbstractContextManager[Scorer]) -> Iterator[Scorer]:
    """The same model without anything shared."""
    with opened as scorer:
        yield OneByOne(scorer)


def timed(call: Callable[[], Likelihoods]) -> tuple[Likelihoods, Cost]:
    """What it returns, and what it cost."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return found, Cost(time.perf_counter() - wall, time.process_time() - cpu)


def ours(task: Path, limit: int, source: Checkpoint, opened: Callable[[int], Any]) -> Likelihoods:
    """quantkit's whole call, with any engine."""
    result = run_task(str(task), opened, source.tokenizer, CONTEXT, shots=SHOTS, limit=limit)
    return [answer["loglikelihoods"] for answer in result.answers]


def hf(task: Path, limit: int, source: Checkpoint, batch_size: int) -> Likelihoods:
    """lm-eval's whole call, with its own model."""
    model = HFLM(
        pretrained=str(source.path),
        device="cpu",
        dtype="float32",
        batch_size=batch_size,
        max_length=CONTEXT,
    )
    loaded = load_task(str(task), {}, SHOTS)
    for leaf in loaded["tasks"].values():
        leaf.set_fewshot_seed(seed=1234)
    results = lm_eval.evaluate(model, loaded, limit=limit, bootstrap_iters=0)
    (samples,) = results["samples"].values()
    return [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]


def subjects(directory: Path) -> dict[str, int]:
    """Every subject that there is, and how many questions it has."""
    return {
        path.name.removesuffix("_test.csv"): len(csv_questions(path))
        for path in sorted((directory / "test").glob("*_test.csv"))
    }


def task_of(subject: str, directory: Path, out: Path) -> Path:
    """One subject of ``evals/mmlu_csv.yaml`` as a task of its own."""
    lm_evals = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default" / f"mmlu_{subject}.yaml"
    path = out / f"{subject}.yaml"
    path.write_text(
        f"include: {lm_evals}\n"
        f"task: mmlu_csv_{subject}\n"
        "custom_dataset: !function quantkit.evaluation.questions.mmlu_csv\n"
        f"dataset_kwargs: {{subject: {subject}, mmlu_csv: {json.dumps(str(directory))}}}\n"
    )
    return path


def best_batch_size(task: Path, source: Checkpoint) -> int:
    """The fastest of ``hf``, on a few questions."""
    seconds = {n: timed(partial(hf, task, TRIED, source, n))[1] for n in BATCH_SIZES}
    for size, cost in seconds.items():
        print(f"hf with batches of {size}: {cost.wall:.1f} s, {cost.cpu:.1f} CPU s", flush=True)
    return min(seconds, key=lambda n: seconds[n].wall)


def differing(one: Likelihoods, other: Likelihoods) -> list[float]:
    """Gaps in nats, to ``other``, where the likeliest choices differ."""
    assert len(one) == len(other)
    picks = [choices.index(max(choices)) for choices in one]
    return [
        max(choices) - choices[pick]
        for pick, choices in zip(picks, other, strict=True)
        if choices[pick] < max(choices)
    ]


@dataclass(frozen=True)
class Pair:
    """One subject on both sides: what both cost, None where only picks were compared; the gaps of
    the picks that differ and how far likelihoods are apart at most, in nats."""

    sides: str
    subject: str
    questions: int
    gaps: list[float]
    furthest: float
    costs: tuple[Cost, Cost] | None = None

    @property
    def same(self) -> int:
        """How many picks are the same."""
        return self.questions - len(self.gaps)

    def row(self) -> str:
        """A line of the table."""
        numbers = ["–"] * 6
        if self.costs:
            ours, theirs = self.costs
            numbers = [
                text
                for a, b in ((ours.wall, theirs.wall), (ours.cpu, theirs.cpu))
                for text in (f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}")
            ]
        return f"| {self.subject} | {' | '.join(numbers)} | {self.same} of {self.questions} |"


def compared(sides: str, subject: str, fast: Callable[[], Likelihoods],
             slow: Callable[[], Likelihoods], *, swapped: bool) -> Pair:  # fmt: skip
    """Run both; ``swapped``: the slow one first."""
    if swapped:
        theirs, theirs_cost = timed(slow)
        found, cost = timed(fast)
    else:
        found, cost = timed(fast)
        theirs, theirs_cost = timed(slow)
    both = zip(chain(*found), chain(*theirs), strict=True)
    furthest = max(abs(one - other) for one, other in both)
    gaps = differing(found, theirs)
    return Pair(sides, subject, len(found), gaps, furthest, (cost, theirs_cost))


def read_pairs(path: Path | None) -> list[Pair]:
    """What earlier calls kept, a JSON object a line."""
    if path is None or not path.is_file():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Pair(**{**one, "costs": one["costs"] and tuple(Cost(**cost) for cost in one["costs"])})
        for one in found
    ]


def summary(pairs: Sequence[Pair]) -> Iterator[str]:
    """The ratios and the picks of all pairs of the same sides."""
    costs = [pair.costs for pair in pairs if pair.costs]
    for what in ("wall", "cpu") if costs else ():
        ratios = [getattr(b, what) / getattr(a, what) for a, b in costs]
        logs = [math.log(ratio) for ratio in ratios]
        spread = math.exp(statistics.stdev(logs)) if len(logs) > 1 else float("nan")
        yield (
            f"{what}: {math.exp(statistics.mean(logs)):.2f} times faster in {len(costs)} pairs "
            f"(x/ {spread:.2f} from pair to pair; {min(ratios):.2f} to {max(ratios):.2f})"
        )
    asked, same = sum(pair.questions for pair in pairs), sum(pair.same for pair in pairs)
    gaps = ", ".join(f"{gap:.2g}" for gap in sorted(chain(*(p.gaps for p in pairs)))) or "none"
    yield (
        f"{same} of {asked} picks equal ({same / asked:.2%}); gaps of the others in nats: {gaps}; "
        f"likelihoods differ by {max(pair.furthest for pair in pairs):.2g} at most"
    )


def main() -> None:
    """Print a row a pair, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mmlu", type=Path, default=MMLU, help="Holds dev/ and test/.")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--questions", type=int, default=100, help="Of each pair, at most.")
    parser.add_argument("--subject", action="append", help="Instead of subjects drawn by seed.")
    parser.add_argument("--batch-size", type=int, help="Of hf; default: the best of several.")
    parser.add_argument("--spec", default="gguf:F16", help="What llama.cpp is given.")
    parser.add_argument("--only", choices=("transformers", "llamacpp"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Pairs of this and of earlier calls.")
    parser.add_argument("--picks", action="store_true", help="Without seconds.")
    options = parser.parse_args()
    counts = subjects(options.mmlu)
    enough = [name for name, count in counts.items() if count >= options.questions]
    drawn = options.subject or random.Random(options.seed).sample(enough, options.pairs)
    source = Checkpoint.open("demo:smollm2-135m")
    print(f"{torch.get_num_threads()} threads; subjects: {', '.join(drawn)}", flush=True)
    done = read_pairs(options.keep)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        paths = {subject: task_of(subject, options.mmlu.resolve(), out) for subject in drawn}
        hf(paths[drawn[0]], 1, source, 1)  # imports and first touches are nobody's seconds
        sides: dict[str, tuple[Side, Side]] = {}
        if options.only != "llamacpp":
            size = options.batch_size or best_batch_size(paths[drawn[0]], source)
            sides["transformers / hf"] = (
                lambda path, n: ours(path, n, source, lambda c: TransformersScorer(source, c)),
                lambda path, n: hf(path, n, source, size),
            )
        if options.only != "transformers":
            variant = convert(source, Spec.parse(options.spec), None, out)
            sides[f"llamacpp {options.spec} / one by one"] = (
                lambda path, n: ours(path, n, source, lambda c: LlamaScorer(variant, c)),
                lambda path, n: ours(
                    path, n, source, lambda c: one_by_one(LlamaScorer(variant, c))
                ),
            )
        for name, (fast, slow) in sides.items():
            print(f"\n{name}\n\n{TITLES}", flush=True)
            fast(paths[drawn[0]], 1)
            for number, (subject, path) in enumerate(paths.items()):
                if any((pair.sides, pair.subject) == (name, subject) for pair in done):
                    continue
                calls = (partial(side, path, options.questions) for side in (fast, slow))
                pair = compared(name, subject, *calls, swapped=number % 2 == 1)
                if options.picks:
                    pair = replace(pair, costs=None)
                done.append(pair)
                print(pair.row(), flush=True)
                if options.keep:
                    with options.keep.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(pair)) + "\n")
            print("", *summary([pair for pair in done if pair.sides == name]), sep="\n", flush=True)


if __name__ == "__main__":
    spin_briefly()
    main()
