"""What the gateway costs: one llama-server asked directly and through the gateway, in turns.

    python -m tests.benchmarks.gateway_overhead            # 5 minutes on two idle cores
    python -m tests.benchmarks.gateway_overhead --apart    # 3 minutes

Both ways reach the same process of the engine. A pair is the same requests both ways, one after
the other, the first way drawn by lot; the ratio of output tokens/s and the difference of median
TTFT are of pairs, given as median with the interval that holds the true median with 95 %
confidence (order statistics; the whole range where there are fewer than six pairs).

By default client, gateway and engine compute on the same cores, as on a laptop: what the gateway
takes, the engine lacks. With ``--apart`` the engine has one half of the cores and the others have
the other half, as where it computes on a GPU or on another machine; the model is then a small one,
for the rate of tokens of such an engine. CPU seconds of the processes do not depend on what else
the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from quantkit.engines.llamacpp import LlamaCpp
from quantkit.engines.process import free_port, launched
from quantkit.engines.server import ServeOptions
from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert
from quantkit.system.threads import spin_briefly
from tests.integration.gateways import KEY, gateway
from tests.models import make_checkpoint

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")
SMALL = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
"""30 million random weights."""
FEWEST = 8
"""Requests of a round at low concurrency."""


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
    gateway_us: float
    engine_us: float
    """CPU time of a process for each token of output."""


@dataclass(frozen=True)
class Ways:
    """The same engine, and whom to watch."""

    alone: str
    gateway: str
    engine_pid: int
    gateway_pid: int


async def drive(url: str, load: Load, seed: int) -> tuple[float, float]:
    """Output tokens/s and median TTFT in ms of so many requests, each a stream on a connection of
    its own, so many at a time."""
    lot = random.Random(seed)
    prompts = [" ".join(lot.choices(WORDS, k=load.prompt_words)) for _ in range(load.requests)]
    waiting = iter(prompts)
    firsts: list[float] = []

    async def worker(session: aiohttp.ClientSession) -> None:
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

    headers = {"Authorization": f"Bearer {KEY}"}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        began = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(load.concurrency)))
        seconds = time.perf_counter() - began
    return load.requests * load.output_tokens / seconds, 1000 * statistics.median(firsts)


def measure(ways: Ways, url: str, load: Load, seed: int) -> Measured:
    """One side of a pair."""
    before = [cpu_seconds(pid) for pid in (ways.gateway_pid, ways.engine_pid)]
    tokens_per_s, ttft_ms = asyncio.run(drive(url, load, seed))
    after = [cpu_seconds(pid) for pid in (ways.gateway_pid, ways.engine_pid)]
    tokens = load.requests * load.output_tokens
    spent = [1e6 * (b - a) / tokens for a, b in zip(before, after, strict=True)]
    return Measured(tokens_per_s, ttft_ms, *spent)


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


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


@contextmanager
def both_ways(
    work: Path, variant: Variant, levels: Sequence[int], options: argparse.Namespace
) -> Iterator[Ways]:
    """The engine and a gateway before it, each on its cores."""
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    theirs, ours = (cores[:half], cores[half:] or cores) if options.apart else (cores, cores)
    port = free_port()
    served = ServeOptions(
        port=port,
        api_key=KEY,
        context=2 * options.prompt_words + options.output_tokens + 64,
        slots=max(levels),
        model_name="m",
    )
    command = LlamaCpp().server(variant, served)
    argv = (*command.argv, "--threads", str(len(theirs)))
    backend = {"url": f"http://127.0.0.1:{port}", "slots": max(levels), "api_key_env": "FAR"}
    os.sched_setaffinity(0, theirs)
    with launched("llamacpp", argv, command.env, work / "log") as server:
        server.wait_ready("127.0.0.1", port, command)
        os.sched_setaffinity(0, ours)
        with gateway(work, {"backends": {"m": backend}}, FAR=KEY) as between:
            yield Ways(f"http://127.0.0.1:{port}", between.url, server.pid, between.process.pid)
    print(f"\nengine on cores {theirs}, gateway and client on {ours}")


def row(ways: Ways, level: int, options: argparse.Namespace) -> str:
    """Measure one concurrency."""
    requests = options.rounds * max(level, FEWEST)
    load = Load(level, requests, options.prompt_words, options.output_tokens)
    lot = random.Random(level)
    for url in (ways.alone, ways.gateway):
        measure(ways, url, load, -1)
    pairs: list[tuple[Measured, Measured]] = []
    for number in range(options.pairs):
        found = {
            url: measure(ways, url, load, number)
            for url in lot.sample([ways.alone, ways.gateway], 2)
        }
        one, other = found[ways.alone], found[ways.gateway]
        pairs.append((one, other))
        print(
            f"{level}: {one.tokens_per_s:.1f} and {other.tokens_per_s:.1f} tokens/s; TTFT "
            f"{one.ttft_ms:.1f} and {other.ttft_ms:.1f} ms; gateway {other.gateway_us:.0f} µs",
            flush=True,
        )
    ratios = [other.tokens_per_s / one.tokens_per_s for one, other in pairs]
    added = [other.ttft_ms - one.ttft_ms for one, other in pairs]
    low, high = interval(ratios)
    first, last = interval(added)
    return (
        f"| {level} | {statistics.median(one.tokens_per_s for one, _ in pairs):.0f} | "
        f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) | "
        f"{statistics.median(one.ttft_ms for one, _ in pairs):.1f} | "
        f"{statistics.median(added):+.1f} ({first:+.1f} to {last:+.1f}) | "
        f"{statistics.median(other.gateway_us for _, other in pairs):.0f} | "
        f"{statistics.median(one.engine_us for one, _ in pairs):.0f} |"
    )


def main() -> None:
    """Print one line a pair, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--apart", action="store_true", help="The engine has cores of its own.")
    parser.add_argument("--model", type=Path, help="A GGUF instead of the demo or the small one.")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=1, help="Requests a worker.")
    parser.add_argument("--prompt-words", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=48)
    options = parser.parse_args()
    levels = [int(level) for level in options.concurrency.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        if options.model:
            variant = open_variant(options.model)
        else:
            source = (
                make_checkpoint(work / "small", **SMALL) if options.apart else "demo:smollm2-135m"
            )
            variant = convert(Checkpoint.open(str(source)), Spec("gguf", "Q4_0"), None, work)
        print(f"{variant.id}, {options.pairs} pairs\n")
        with both_ways(work, variant, levels, options) as ways:
            rows = [row(ways, level, options) for level in levels]
    print("\n| concurrency | tokens/s alone | gateway / alone | TTFT alone, ms | added TTFT, ms "
          "| gateway, CPU µs a token | engine, CPU µs a token |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    spin_briefly()
    main()
