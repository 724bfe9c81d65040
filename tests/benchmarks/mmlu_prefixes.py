"""MMLU 5-shot with shared beginnings, beside lm-eval's own ``hf`` model and a naive llama.cpp.

    python -m tests.benchmarks.mmlu_prefixes [--mmlu DIR] [--pairs 10] [--questions 100]

Each pair is the first questions of one subject (drawn by seed) of the demo model, as a whole call:
the task with its data, the tokens, loading the model, the answers. Both sides run in this process,
in turn, in alternating order, with the same threads and in float32. ``hf`` runs with the best of
its batch sizes, tried out beforehand; it computes the choices of a question at once, and everything
else again. llama.cpp's other side is given one question at a time.

Answers are compared by the choice that is the likeliest. Where both sides differ, the gap is
printed: how much less likely, in nats, the one's pick is to the other; near ties are expected.
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
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.engines.base import Scorer
from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.engines.transformers import TransformersScorer
from quantkit.evaluate.questions import csv_questions
from quantkit.evaluate.tasks import load_task, run_task
from quantkit.spec import Spec
from quantkit.threads import spin_briefly

SHOTS = 5
CONTEXT = 2048
BATCH_SIZES = (1, 4, 8, 16)
TRIED = 16
"""Questions for each batch size of ``hf``."""
MMLU = Path(__file__).parents[3] / "shared" / "data" / "mmlu"

Likelihoods = list[list[float]]
"""Of each question's choices, in nats."""


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
        "custom_dataset: !function quantkit.evaluate.questions.mmlu_csv\n"
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


class Comparison:
    """Pairs of two sides, printed as they come, with their ratio and its spread at the end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._costs: list[tuple[Cost, Cost]] = []
        self._gaps: list[float] = []
        self._questions = 0
        self._furthest = 0.0

    def add(self, subject: str, fast: Callable[[], Likelihoods],
            slow: Callable[[], Likelihoods]) -> None:  # fmt: skip
        """One pair; who goes first changes from pair to pair."""
        if len(self._costs) % 2:
            theirs, theirs_cost = timed(slow)
            found, cost = timed(fast)
        else:
            found, cost = timed(fast)
            theirs, theirs_cost = timed(slow)
        gaps = differing(found, theirs)
        self._costs.append((cost, theirs_cost))
        self._gaps += gaps
        self._questions += len(found)
        for one, other in zip(chain(*found), chain(*theirs), strict=True):
            self._furthest = max(self._furthest, abs(one - other))
        print(
            f"| {self._name} | {subject} | {len(found)} | {cost.wall:.1f} | {theirs_cost.wall:.1f} "
            f"| {theirs_cost.wall / cost.wall:.2f} | {cost.cpu:.1f} | {theirs_cost.cpu:.1f} "
            f"| {theirs_cost.cpu / cost.cpu:.2f} | {len(found) - len(gaps)} |",
            flush=True,
        )

    def summary(self) -> Iterator[str]:
        """The ratios and the picks of all pairs."""
        for what in ("wall", "cpu"):
            ratios = [getattr(b, what) / getattr(a, what) for a, b in self._costs]
            logs = [math.log(ratio) for ratio in ratios]
            spread = math.exp(statistics.stdev(logs)) if len(logs) > 1 else float("nan")
            yield (
                f"{self._name}: {what}: {math.exp(statistics.mean(logs)):.2f} times faster "
                f"(x/ {spread:.2f} from pair to pair; {min(ratios):.2f} to {max(ratios):.2f})"
            )
        equal = self._questions - len(self._gaps)
        gaps = ", ".join(f"{gap:.2g}" for gap in sorted(self._gaps)) or "none"
        yield (
            f"{self._name}: {equal} of {self._questions} picks equal "
            f"({equal / self._questions:.2%}); gaps of the others in nats: {gaps}; "
            f"likelihoods differ by {self._furthest:.2g} at most"
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
    options = parser.parse_args()
    counts = subjects(options.mmlu)
    enough = [name for name, count in counts.items() if count >= options.questions]
    drawn = options.subject or random.Random(options.seed).sample(enough, options.pairs)
    source = Checkpoint.open("demo:smollm2-135m")
    print(f"{torch.get_num_threads()} threads; subjects: {', '.join(drawn)}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        paths = {subject: task_of(subject, options.mmlu.resolve(), out) for subject in drawn}
        hf(paths[drawn[0]], 1, source, 1)  # imports and first touches are nobody's seconds
        rows = []
        if options.only != "llamacpp":
            size = options.batch_size or best_batch_size(paths[drawn[0]], source)
            rows.append((
                Comparison(f"transformers / hf with batches of {size}"),
                lambda path, n: ours(path, n, source, lambda c: TransformersScorer(source, c)),
                lambda path, n: hf(path, n, source, size),
            ))  # fmt: skip
        if options.only != "transformers":
            variant = convert(source, Spec.parse(options.spec), None, out)
            rows.append((
                Comparison(f"llamacpp {options.spec} / one by one"),
                lambda path, n: ours(path, n, source, lambda c: LlamaScorer(variant, c)),
                lambda path, n: ours(
                    path, n, source, lambda c: one_by_one(LlamaScorer(variant, c))
                ),
            ))  # fmt: skip
        print(
            "| sides | subject | questions | s | s | ratio | CPU s | CPU s | ratio | same picks |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for _, fast, _ in rows:
            fast(paths[drawn[0]], 1)
        for subject, path in paths.items():
            for comparison, fast, slow in rows:
                comparison.add(
                    subject, partial(fast, path, options.questions),
                    partial(slow, path, options.questions),
                )  # fmt: skip
    for comparison, _, _ in rows:
        print(*comparison.summary(), sep="\n")


if __name__ == "__main__":
    spin_briefly()
    main()
