"""The whole WikiText-2 test: quantkit's drift beside llama-perplexity's, and the seconds of both.

    python -m tests.benchmarks.agreement [--context 2048] [--windows N] [--scheme Q4_K_M]

The demo model; the base of both is its unquantized GGUF, which llama-perplexity runs and quantkit
runs in the same llama.cpp. The tool stores its base's distributions (25 MB a window of 512); they
are removed at the end. Beside it, `quantkit evaluate` as it is used, with the checkpoint in
transformers as the reference, whose hidden states are stored: its seconds and their bytes, which
`--numbers` leaves out. Prints one table in Markdown. What is done stays in `--work`: the same
command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from quantkit.data.calibration import bos_id
from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.evaluation.divergence import Drift, Positions, join, score
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.perplexity import Windows, windows
from quantkit.evaluation.plan import EvaluationPlan
from quantkit.evaluation.reference import Reference
from quantkit.evaluation.statistics import perplexity
from quantkit.evaluation.text import summaries
from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert_many
from quantkit.system.files import replacing, write_json
from tests import llama_perplexity
from tests.conftest import SHARED_DATA
from tests.llama_perplexity import printed

TEXT = SHARED_DATA / "wikitext-2-raw" / "wiki.test.raw"
SCHEMES = ("Q8_0", "Q4_K_M", "Q4_0")
ROWS = {
    "ppl": "Mean PPL(Q)", "kld_mean": "Mean KLD", "kld_median": "Median KLD",
    "kld_p90": "90.0% KLD", "kld_p95": "95.0% KLD", "kld_p99": "99.0% KLD",
    "kld_p999": "99.9% KLD", "kld_max": "Maximum KLD", "top1_agreement": "Same top p",
    "delta_p_rms": "RMS Δp", "delta_p_mean": "Mean Δp",
}  # fmt: skip
PERCENT = ("top1_agreement", "delta_p_rms", "delta_p_mean")
KEPT = 16
"""Windows between two writes to the disk."""


class Steps:
    """What each step gave, as JSON, and its seconds: kept in a file, so that none is done twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def of(self, name: str, make: Callable[[], Any]) -> Any:
        """``make()``, or what it gave before."""
        if name not in self:
            start = time.perf_counter()
            found = make()
            self._done[name] = {"found": found, "seconds": time.perf_counter() - start}
            write_json(self._path, self._done)
            print(f"{name}: {self.seconds(name):.0f} s", flush=True)
        return self._done[name]["found"]

    def forget(self, name: str) -> None:
        """Do it again when it is asked for."""
        self._done.pop(name, None)

    def seconds(self, name: str) -> float:
        """What the step took."""
        return float(self._done[name]["seconds"])


class Row(NamedTuple):
    """A metric of one scheme, by both."""

    scheme: str
    metric: str
    ours: float
    theirs: float

    @property
    def difference(self) -> float:
        """Ours over theirs, less 1."""
        return self.ours / self.theirs - 1

    def __str__(self) -> str:
        """A line of the table."""
        numbers = f"{self.ours:.6g} | {self.theirs:.6g} | {100 * self.difference:+.4f} %"
        return f"| {self.scheme} | {self.metric} | {numbers} |"


def logits(variant: Variant, cut: Windows) -> Iterator[torch.Tensor]:
    """``(scored, vocabulary)`` of each window, in llama.cpp."""
    with LlamaScorer(variant, cut.context) as scorer:
        for rows in scorer.logits(cut.ids, [cut.first] * len(cut.ids)):
            yield rows[: cut.scored]


def positions(base: Variant, variant: Variant, cut: Windows, place: Path) -> Positions:
    """Every scored position of the variant against the base; both are computed a few windows at a
    time, and these kept in ``place``."""
    found = []
    for start in range(0, len(cut.ids), KEPT):
        path = place / f"{variant.scheme}-{start}.safetensors"
        if not path.is_file():
            some = replace(cut, ids=cut.ids[start : start + KEPT])
            pairs = zip(logits(variant, some), logits(base, some), strict=True)
            scored = join([score(a, some.targets(i), b) for i, (a, b) in enumerate(pairs)])
            with replacing(path) as file:
                save_file({"finite": scored.finite, **scored.columns()}, file)
        columns = load_file(path)
        nll, finite = columns.pop("nll"), columns.pop("finite")
        found.append(Positions(nll, finite, Drift(**columns)))
    return join(found)


def theirs(
    base: Variant, variants: dict[str, Variant], cut: Windows, place: Path, steps: Steps
) -> dict[str, str]:
    """What llama-perplexity prints of each, by its scheme."""
    size = {"context": cut.context, "windows": len(cut.ids)}
    saved = place / "base"
    if not saved.is_file() and any(f"llama-perplexity: {name}" not in steps for name in variants):
        steps.forget("llama-perplexity: base")
    found = {}
    for scheme, variant in {"base": base, **variants}.items():
        options: tuple[str | Path, ...] = ("--kl-divergence-base", saved, "--kl-divergence")
        if scheme == "base":
            options = ("-f", TEXT, "--save-all-logits", saved)
        call = partial(llama_perplexity.run, "-m", variant.weights, *options, **size)
        found[scheme] = steps.of(f"llama-perplexity: {scheme}", call)
    saved.unlink(missing_ok=True)
    return found


def compare(
    base: Variant, variants: dict[str, Variant], cut: Windows, place: Path, steps: Steps
) -> Iterator[Row]:
    """Both against the unquantized GGUF; quantkit computes it again beside each variant."""
    outputs = {
        name: printed(text) for name, text in theirs(base, variants, cut, place, steps).items()
    }
    base_ppl = outputs["base"]["PPL"].value
    for index, (scheme, variant) in enumerate(variants.items()):
        values = positions(base, variant, cut, place)
        assert values.drift is not None
        ours, there = dict(summaries(values)), outputs[scheme]
        if index == 0:
            yield Row("BF16", "ppl", perplexity(values.drift.reference_nll).value, base_ppl)
        exact = there["Mean PPL(Q)"].value / base_ppl
        yield Row(scheme, "ppl_ratio (of its two runs)", ours["ppl_ratio"].value, exact)
        for name, words in ROWS.items():
            value = (100 if name in PERCENT else 1) * ours[name].value
            yield Row(scheme, name, value, there[words].value)
        assert not values.non_finite


def text_windows(source: Checkpoint, context: int, limit: int | None = None) -> Windows:
    """WikiText-2's test split as quantkit cuts it."""
    tokenizer = source.tokenizer
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False).input_ids
    return windows(ids, context, bos_id(tokenizer), limit)


def made(source: Checkpoint, schemes: tuple[str, ...], place: Path) -> dict[str, Variant]:
    """The source in each scheme, made where it is not there."""
    specs = {scheme: Spec("gguf", scheme) for scheme in schemes}
    missing = [spec for spec in specs.values() if not (place / spec.directory).is_dir()]
    convert_many(source, missing, None, place)
    return {scheme: open_variant(place / spec.directory) for scheme, spec in specs.items()}


def timed(
    source: Checkpoint,
    plan: EvaluationPlan,
    variants: dict[str, Variant],
    place: Path,
    steps: Steps,
) -> Iterator[str]:
    """Seconds of `quantkit evaluate` beside llama-perplexity's, and the bytes of the reference."""
    (cut,) = plan.texts.values()
    cache = place / "references"

    def build() -> int:
        Reference.build(source, cut, cache)
        return sum(file.stat().st_size for file in cache.iterdir())

    size = steps.of("quantkit: base", build)
    for scheme, variant in variants.items():

        def measure(one: Variant = variant) -> float:
            references = Reference.of_texts(source, plan.texts, cache)
            (found,) = evaluate(one, references, plan).texts.values()
            return found.metrics["ppl"].value

        steps.of(f"quantkit: {scheme}", measure)
    yield f"\nreference: {size / 2**20:.0f} MiB\n"
    yield "| seconds | quantkit | llama-perplexity |\n| --- | --- | --- |"
    for name in ("base", *variants):
        times = (steps.seconds(f"{tool}: {name}") for tool in ("quantkit", "llama-perplexity"))
        yield f"| {name} | " + " | ".join(f"{time:.0f}" for time in times) + " |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, help="at most so many (default: the whole text)")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="default: all")
    parser.add_argument("--work", type=Path, help="keeps what is done (default: nothing is kept)")
    parser.add_argument("--numbers", action="store_true", help="no seconds of quantkit evaluate")
    given = parser.parse_args()
    schemes = tuple(given.scheme or SCHEMES)
    source = Checkpoint.open("demo:smollm2-135m")
    cut = text_windows(source, given.context, given.windows)
    print(f"{len(cut.ids)} windows of {given.context}: {len(cut.ids) * cut.scored} positions")
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        variants = made(source, ("BF16", *schemes), work)
        base = variants.pop("BF16")
        place = work / f"{given.context}x{len(cut.ids)}"
        place.mkdir(exist_ok=True)
        steps = Steps(place / "steps.json")
        rows = [*compare(base, variants, cut, place, steps)]
        print("| | metric | quantkit | llama-perplexity | difference |")
        print("| --- | --- | --- | --- | --- |")
        print(*rows, sep="\n", flush=True)
        if not given.numbers:
            plan = EvaluationPlan(source.tokenizer, given.context, {"text": cut})
            print("\n".join(timed(source, plan, variants, place, steps)))


if __name__ == "__main__":
    main()
