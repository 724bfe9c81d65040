"""What the gateway costs: one llama-server asked directly and through the gateway, in turns.

    python -m tests.benchmarks.gateway_overhead [--model FILE] [--concurrency 1,8,32] [--pairs 7]

Both ways reach the same process of the engine. A pair is the same requests both ways, one after
the other, the first way drawn by lot; the ratio of output tokens/s and the difference of median
TTFT are of pairs, given as median with the interval that holds the true median with 95 %
confidence (order statistics; the whole range where there are fewer than six pairs).
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.engines.base import ServeOptions
from quantkit.engines.llamacpp import LlamaCpp
from quantkit.engines.process import free_port, launched
from quantkit.spec import Spec
from quantkit.threads import spin_briefly
from quantkit.variant import Variant, open_variant
from tests.integration.gateways import KEY, gateway

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")


@dataclass(frozen=True)
class Load:
    concurrency: int
    requests: int
    prompt_words: int
    output_tokens: int


@dataclass(frozen=True)
class Measured:
    tokens_per_s: float
    ttft_ms: float
    """The median."""


async def drive(url: str, load: Load, seed: int) -> Measured:
    """So many requests, each a stream on a connection of its own, so many at a time."""
    lot = random.Random(seed)
    prompts = [" ".join(lot.choices(WORDS, k=load.prompt_words)) for _ in range(load.requests)]
    waiting = iter(prompts)
    firsts: list[float] = []
    tokens = 0

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal tokens
        for prompt in waiting:
            body = {
                "model": "m",
                "prompt": prompt,
                "max_tokens": load.output_tokens,
                "ignore_eos": True,
                "stream": True,
                "cache_prompt": False,
            }
            began = time.perf_counter()
            first = None
            last = b""
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for chunk in answer.content.iter_any():
                    first = first or time.perf_counter()
                    last = (last + chunk)[-2000:]
            assert first is not None
            assert f'"predicted_n":{load.output_tokens}'.encode() in last, last
            firsts.append(first - began)
            tokens += load.output_tokens

    headers = {"Authorization": f"Bearer {KEY}"}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        began = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(load.concurrency)))
        seconds = time.perf_counter() - began
    return Measured(tokens / seconds, 1000 * statistics.median(firsts))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics that holds the median with 95 % confidence."""
    found = sorted(values)
    count = len(found)
    low = 0
    while True:
        outside = sum(math.comb(count, i) for i in range(low + 2)) / 2**count * 2
        if outside > 0.05:
            return found[low], found[count - 1 - low]
        low += 1


def main() -> None:
    """Print one line a pair, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="A GGUF; default: the demo source as Q4_0.")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=4, help="Requests a worker.")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    options = parser.parse_args()
    levels = [int(level) for level in options.concurrency.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        variant: Variant = (
            open_variant(options.model)
            if options.model
            else convert(Checkpoint.open("demo:smollm2-135m"), Spec("gguf", "Q4_0"), None, work)
        )
        port = free_port()
        command = LlamaCpp().server(
            variant,
            ServeOptions(
                port=port,
                api_key=KEY,
                context=2 * options.prompt_words + options.output_tokens + 64,
                slots=max(levels),
                model_name="m",
            ),
        )
        backend = {"url": f"http://127.0.0.1:{port}", "slots": max(levels), "api_key_env": "FAR"}
        with launched("llamacpp", command.argv, command.env, work / "log") as server:
            server.wait_ready("127.0.0.1", port, command)
            with gateway(work, {"backends": {"m": backend}}, FAR=KEY) as between:
                ways = {"alone": f"http://127.0.0.1:{port}", "gateway": between.url}
                print(f"{variant.id}, {options.pairs} pairs\n")
                rows = [row(ways, level, options) for level in levels]
    print("\n| concurrency | tokens/s alone | gateway / alone | TTFT alone, ms | added TTFT, ms |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(rows))


def row(ways: dict[str, str], level: int, options: argparse.Namespace) -> str:
    """Measure one concurrency."""
    requests = options.rounds * max(level, 4)
    load = Load(level, requests, options.prompt_words, options.output_tokens)
    lot = random.Random(level)
    ratios, added, alone = [], [], []
    for url in ways.values():
        asyncio.run(drive(url, load, -1))
    for pair in range(options.pairs):
        found = {}
        for way in lot.sample(sorted(ways), 2):
            found[way] = asyncio.run(drive(ways[way], load, pair))
        one, other = found["alone"], found["gateway"]
        ratios.append(other.tokens_per_s / one.tokens_per_s)
        added.append(other.ttft_ms - one.ttft_ms)
        alone.append(one)
        print(
            f"{level}: {one.tokens_per_s:.1f} and {other.tokens_per_s:.1f} tokens/s; "
            f"TTFT {one.ttft_ms:.1f} and {other.ttft_ms:.1f} ms",
            flush=True,
        )
    low, high = interval(ratios)
    first, last = interval(added)
    return (
        f"| {level} | {statistics.median(one.tokens_per_s for one in alone):.0f} | "
        f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) | "
        f"{statistics.median(one.ttft_ms for one in alone):.1f} | "
        f"{statistics.median(added):+.1f} ({first:+.1f} to {last:+.1f}) |"
    )


if __name__ == "__main__":
    spin_briefly()
    main()
