"""Every demo variant under every load, and the unquantized model on both engines.

    python -m tests.benchmarks.sweep [--out DIR] [--seconds 3] [--slo ttft_ms=2000,itl_ms=200]

A run without an evaluation: it goes on where it was interrupted, and the variants of an earlier run
of the demo in ``--out`` are used again. Prints the tables of RESULTS.md: throughput by concurrency
as the median of three repetitions with their range, latencies, how far from the memory's limit, and
how many times faster one engine is than the other with the same weights. With ``--slo`` the
goodput is searched as well, which doubles the time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from quantkit.ledger import Ledger, Row
from quantkit.ledger.load import Bench
from quantkit.runs import pipeline
from quantkit.runs.recipe import load_recipe

SAME_WEIGHTS = ("gguf-BF16", "reference")
"""The unquantized model in llama.cpp and in vLLM."""
VARIANTS = "[gguf:BF16, gguf:Q8_0, gguf:Q4_K_M, gguf:Q4_0, gptq:w4g64, awq:w4g64]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="demo:smollm2-135m")
    parser.add_argument("--convert", default=VARIANTS)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--concurrency", default="auto")
    parser.add_argument("--slo", help="Such as ttft_ms=2000,itl_ms=200.")
    given = parser.parse_args()
    load = [
        f"concurrency: {given.concurrency}",
        f"seconds: {given.seconds}",
        f"repetitions: {given.repetitions}",
    ]
    if given.slo:
        load.append(f"slo: {{{given.slo.replace('=', ': ').replace(',', ', ')}}}")
    overrides = [
        f"source={given.source}",
        f"convert={given.convert}",
        "evaluate=null",
        f"bench={{{', '.join(load)}}}",
    ]
    ledger = pipeline.run(load_recipe("quickstart", overrides), given.out)
    for lines in (machine(ledger), throughput(ledger), single(ledger), engines(ledger)):
        print("\n".join(lines), end="\n\n")
    print("\n".join(goodputs(ledger)))


def machine(ledger: Ledger) -> list[str]:
    found = ledger.environment
    memory = found.memory_bandwidth
    speed = f", memory read at {memory.read_bytes_per_s / 1e9:.1f} GB/s" if memory else ""
    failed = [f"{row.id} failed: {row.failed.error}" for row in ledger.variants if row.failed]
    return [f"{found.cpu}, {found.cores} cores{speed}; {ledger.seconds / 60:.0f} minutes", *failed]


def throughput(ledger: Ledger) -> list[str]:
    levels = sorted({one.concurrency for row in ledger.variants for one in row.bench})
    head = ["variant", "engine", *(f"{level}" for level in levels)]
    rows = [
        [f"`{row.id}`", engine, *(rate(find(row, engine, level)) for level in levels)]
        for row in ledger.variants
        for engine in dict.fromkeys(one.engine for one in row.bench)
    ]
    return ["Output tokens/s, median (lowest–highest of the repetitions):", "", *table(head, rows)]


def single(ledger: Ledger) -> list[str]:
    head = [
        "variant", "engine", "TTFT p50 ms", "ITL p50 ms", "of bandwidth", "while decoding",
        "start s", "load s", "peak MB", "client cores", "client bound at",
    ]  # fmt: skip
    rows = []
    for row in ledger.variants:
        one = next((found for found in row.bench if found.concurrency == 1), None)
        if one is None:
            continue
        bound = [str(found.concurrency) for found in row.bench if found.client_bound]
        most = max((found.client_cpu or 0.0 for found in row.bench), default=0.0)
        rows.append(
            [
                f"`{row.id}`",
                one.engine,
                f"{one.ttft_ms.p50:.0f}",
                f"{one.itl_ms.p50:.1f}",
                f"{one.bandwidth.share:.0%}" if one.bandwidth else "–",
                f"{one.bandwidth.decode_share:.0%}" if one.bandwidth else "–",
                f"{one.startup_seconds:.1f}",
                f"{one.load_seconds:.2f}" if one.load_seconds is not None else "–",
                f"{one.peak_rss_bytes / 1e6:.0f}",
                f"{most:.2f}",
                ", ".join(bound) or "–",
            ]
        )
    return ["At concurrency 1 (client cores: the most of all levels):", "", *table(head, rows)]


def engines(ledger: Ledger) -> list[str]:
    """vLLM over llama.cpp with the same unquantized weights; by repetition, so with a spread."""
    by_id = {row.id: row for row in ledger.variants}
    if not all(name in by_id and by_id[name].bench for name in SAME_WEIGHTS):
        return []
    here, there = ({one.concurrency: one for one in by_id[name].bench} for name in SAME_WEIGHTS)
    rows = []
    for level in sorted(here.keys() & there.keys()):
        pairs = zip(there[level].repetitions, here[level].repetitions, strict=False)
        ratios = sorted(v.output_tokens_per_s / c.output_tokens_per_s for v, c in pairs)
        middle = there[level].output_tokens_per_s / here[level].output_tokens_per_s
        rows.append([str(level), f"{middle:.2f}", f"{ratios[0]:.2f}–{ratios[-1]:.2f}"])
    head = ["concurrency", "vLLM / llama.cpp", "repetitions"]
    return ["The unquantized model, output tokens/s:", "", *table(head, rows)]


def goodputs(ledger: Ledger) -> list[str]:
    rows = [
        [
            f"`{row.id}`",
            one.engine,
            f"{one.rate_per_s:.2f}",
            f"{one.above_per_s:.2f}" if one.above_per_s is not None else "–",
            f"{one.attained:.0%}" if one.attained is not None else "–",
            str(len(one.readings)),
            one.ended,
        ]
        for row in ledger.variants
        for one in row.goodput
    ]
    if not rows:
        return []
    slo = next(one.slo for row in ledger.variants for one in row.goodput)
    head = ["variant", "engine", "goodput /s", "missed at /s", "attained", "readings", "ended"]
    title = f"TTFT ≤ {slo.ttft_ms} ms and ITL ≤ {slo.itl_ms} ms for {slo.share:.0%}, Poisson:"
    return [title, "", *table(head, rows)]


def find(row: Row, engine: str, level: int) -> Bench | None:
    return next((b for b in row.bench if (b.engine, b.concurrency) == (engine, level)), None)


def rate(found: Bench | None) -> str:
    if found is None:
        return "–"
    spread = found.throughput_spread
    mark = "*" if found.client_bound else ""
    return f"{found.output_tokens_per_s:.0f}{mark} ({spread.low:.0f}–{spread.high:.0f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] * len(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


if __name__ == "__main__":
    main()
