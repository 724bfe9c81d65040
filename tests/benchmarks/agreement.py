"""The whole WikiText-2 test: quantkit's drift beside llama-perplexity's, and the seconds of both.

    python -m tests.benchmarks.agreement [--context 2048] [--windows N] [--scheme Q4_K_M]

The demo model; the base of both is its unquantized GGUF, which llama-perplexity runs and quantkit
runs in the same llama.cpp. The tool stores its base's distributions (25 MB a window of 512); they
are removed at the end. Beside it, `quantkit evaluate` as it is used, with the checkpoint in
transformers as the reference, whose hidden states are stored: its seconds and their bytes. Prints
one table in Markdown.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert_many
from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.evaluate import EvaluationPlan, evaluate
from quantkit.evaluate.divergence import join, score
from quantkit.evaluate.perplexity import Windows, bos_id, windows
from quantkit.evaluate.reference import Reference
from quantkit.evaluate.statistics import perplexity
from quantkit.evaluate.text import summaries
from quantkit.spec import Spec
from quantkit.variant import Variant
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


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add what the block takes."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        print(f"{name}: {self.seconds[name]:.0f} s", flush=True)


def row(scheme: str, name: str, ours: float, theirs: float) -> str:
    """One line of the table."""
    return f"| {scheme} | {name} | {ours:.6g} | {theirs:.6g} | {100 * (ours / theirs - 1):+.4f} % |"


def logits(variant: Variant, cut: Windows) -> Iterator[torch.Tensor]:
    """``(scored, vocabulary)`` of each window, in llama.cpp."""
    with LlamaScorer(variant, cut.context) as scorer:
        for rows in scorer.logits(cut.ids, [cut.first] * len(cut.ids)):
            yield rows[: cut.scored]


def compare(
    base: Variant, variants: dict[str, Variant], cut: Windows, saved: Path, clock: Clock
) -> list[str]:
    """Both against the unquantized GGUF; quantkit computes it again beside each variant."""
    size = {"context": cut.context, "windows": len(cut.ids)}
    with clock.of("llama-perplexity: base"):
        output = llama_perplexity.run(
            "-m", base.weights, "-f", TEXT, "--save-all-logits", saved, **size
        )
    base_ppl = printed(output)["PPL"].value
    found = []
    for scheme, variant in variants.items():
        with clock.of(f"llama-perplexity: {scheme}"):
            output = llama_perplexity.run(
                "-m", variant.weights, "--kl-divergence-base", saved, "--kl-divergence", **size
            )
        theirs = printed(output)
        parts, base_nll = [], []
        for index, (model, known) in enumerate(
            zip(logits(variant, cut), logits(base, cut), strict=True)
        ):
            parts.append(score(model, cut.targets(index), known))
            base_nll.append(score(known, cut.targets(index)).nll)
        ours = dict(summaries(join(parts)))
        if not found:
            found.append(row("BF16", "ppl", perplexity(torch.cat(base_nll)).value, base_ppl))
        exact = theirs["Mean PPL(Q)"].value / base_ppl
        found.append(row(scheme, "ppl_ratio (of its two runs)", ours["ppl_ratio"].value, exact))
        for name, words in ROWS.items():
            value = (100 if name in PERCENT else 1) * ours[name].value
            found.append(row(scheme, name, value, theirs[words].value))
    saved.unlink()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, help="at most so many (default: the whole text)")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="default: all")
    parser.add_argument("--work", type=Path, help="where the files go for the time being")
    given = parser.parse_args()
    schemes = given.scheme or SCHEMES
    source = Checkpoint.open("demo:smollm2-135m")
    tokenizer = source.tokenizer
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False).input_ids
    cut = windows(ids, given.context, bos_id(tokenizer), given.windows)
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        os.environ["QUANTKIT_HOME"] = work  # so that no reference of before is found
        specs = {scheme: Spec("gguf", scheme) for scheme in ("BF16", *schemes)}
        made = convert_many(source, list(specs.values()), None, Path(work))
        files = {
            scheme: variant
            for scheme, spec in specs.items()
            if isinstance(variant := made[spec], Variant)
        }
        base = files.pop("BF16")
        plan = EvaluationPlan(tokenizer, given.context, cut)
        with clock.of("quantkit: reference"):
            reference = Reference.build(source, cut)
        (stored,) = (Path(work) / "references").iterdir()
        size = stored.stat().st_size
        for scheme, variant in files.items():
            with clock.of(f"quantkit: {scheme}"):
                evaluate(variant, reference, plan)
        rows = compare(base, files, cut, Path(work) / "base", clock)
    print(f"\n{len(cut.ids)} windows of {given.context}: {len(cut.ids) * cut.scored} positions")
    print(f"reference: {size / 2**20:.0f} MiB\n")
    print(
        "| | metric | quantkit | llama-perplexity | difference |\n| --- | --- | --- | --- | --- |"
    )
    print("\n".join(rows))
    print("\n| seconds | quantkit | llama-perplexity |\n| --- | --- | --- |")
    for ours, theirs in (("reference", "base"), *((scheme, scheme) for scheme in schemes)):
        times = clock.seconds[f"quantkit: {ours}"], clock.seconds[f"llama-perplexity: {theirs}"]
        print(f"| {ours} | {times[0]:.0f} | {times[1]:.0f} |")


if __name__ == "__main__":
    main()
