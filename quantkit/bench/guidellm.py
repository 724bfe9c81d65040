"""Drive a server with GuideLLM, in a process of its own and offline.

What its figures are, as read in its source (0.8.1) and checked against a server with known times in
``tests/integration/test_bench.py``:

- Throughput counts in a window that opens after the warm-up and closes when the time is up. Tokens
  of requests that the end cuts off are counted as they come (``total``): of completed requests
  alone (``successful``) a short window would lose up to one request a stream.
- Time to first token is from sending the request to the first piece of text, one value a request.
- Inter-token latency is one value a request too, (last - first token) / (tokens - 1), weighted by
  tokens: its percentiles are over requests and do not show a single slow token.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.engines.process import launched
from quantkit.errors import EngineError
from quantkit.load import Percentiles, Reading
from quantkit.progress import say
from quantkit.variant import Model, tokenizer_directory

_SECONDS_BESIDES = 90.0
"""For GuideLLM's own start and end, on a slow machine, and the warm-up's first request."""
_SECONDS_BESIDES_A_LEVEL = 20.0
_ATTEMPTS = 2
"""GuideLLM was seen to wait for its worker for ever at the end of a level, twice in fifty runs."""
_SEED = 20260101
_ONE_REQUEST = {"Connection": "close"}
"""A connection each: llama-server drops kept ones after a streamed answer, and a client that has
sent its next request by then gets an error (6 % of requests, in a loop that did nothing else)."""


@dataclass(frozen=True)
class Target:
    """What to send requests to; the prompts are made with the model's own tokenizer."""

    url: str
    api_key: str
    model_name: str
    model: Model


@dataclass(frozen=True)
class Load:
    """How many requests at the same time, how long each, and for how long."""

    concurrency: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    seconds: float
    warmup_seconds: float


@dataclass(frozen=True)
class Level:
    """What was delivered at one concurrency."""

    concurrency: int
    reading: Reading


def version() -> str:
    """Name and version of the load generator."""
    return f"guidellm {importlib.metadata.version('guidellm')}"


def drive(target: Target, load: Load, stem: Path) -> list[Level]:
    """Put ``load`` on ``target``, one level after the other; what it writes begins with ``stem``.

    Raise EngineError where GuideLLM fails or a level completes no request.
    """
    report = stem.with_name(f"{stem.name}.json")
    report.unlink(missing_ok=True)
    scenario = stem.with_name(f"{stem.name}-scenario.json")
    scenario.write_text(json.dumps(_scenario(target, load, report), indent=2), encoding="utf-8")
    argv = [sys.executable, "-m", "guidellm", "run", "--config", str(scenario), "--disable-console"]
    env = {
        "GUIDELLM__SPEC__BACKEND__API_KEY": target.api_key,
        # One worker, an event loop, keeps up with these levels and starts sooner than several.
        "GUIDELLM__MAX_WORKER_PROCESSES": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "127.0.0.1",
    }
    level_seconds = load.seconds + load.warmup_seconds + _SECONDS_BESIDES_A_LEVEL
    limit = _SECONDS_BESIDES + len(load.concurrency) * level_seconds
    for attempt in range(1, _ATTEMPTS + 1):
        with launched("guidellm", argv, env, stem.with_name(f"{stem.name}.log")) as process:
            try:
                ended = process.wait(limit) == 0
            except EngineError:
                if attempt == _ATTEMPTS:
                    raise
                say(f"{target.model.id}: guidellm stands still after {limit:.0f} s; once more")
                continue
            if not ended or not report.is_file():
                raise process.error(f"ended with exit code {process.exit_code}")
            break
    return parse(json.loads(report.read_text(encoding="utf-8")), load)


def parse(report: dict[str, Any], load: Load) -> list[Level]:
    """Read a GuideLLM JSON report; raise EngineError for a level that says nothing."""
    benchmarks = report["benchmarks"]
    if len(benchmarks) != len(load.concurrency):
        raise EngineError(
            f"guidellm measured {len(benchmarks)} of {len(load.concurrency)} concurrency levels"
        )
    pairs = zip(load.concurrency, benchmarks, strict=True)
    return [_level(concurrency, benchmark, load) for concurrency, benchmark in pairs]


def _level(concurrency: int, benchmark: dict[str, Any], load: Load) -> Level:
    where = f"bench at concurrency {concurrency}"
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    if totals["successful"] == 0:
        raise EngineError(f"{where}: {_why_nothing(benchmark, load)}")
    produced = metrics["output_token_count"]["successful"]
    if produced["min"] != load.output_tokens or produced["max"] != load.output_tokens:
        raise EngineError(
            f"{where}: answers of {produced['min']:.0f} to {produced['max']:.0f} tokens, expected "
            f"{load.output_tokens} each; the server ignores ignore_eos or its context is short"
        )

    def number(value: Any) -> float:
        # GuideLLM writes 0 for a figure of which it has no sample; none of these can be 0.
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise EngineError(f"{where}: {_why_nothing(benchmark, load)}")
        return float(value)

    def percentiles(name: str) -> Percentiles:
        found = metrics[name]["successful"]["percentiles"]
        return Percentiles(**{p: number(found[p]) for p in ("p50", "p95", "p99")})

    return Level(
        concurrency,
        Reading(
            seconds=load.seconds,
            output_tokens_per_s=number(metrics["output_tokens_per_second"]["total"]["mean"]),
            request_per_s=number(metrics["requests_per_second"]["successful"]["mean"]),
            ttft_ms=percentiles("time_to_first_token_ms"),
            itl_ms=percentiles("inter_token_latency_ms"),
            requests=totals["successful"],
            errors=totals["errored"],
            first_error=_first_error(benchmark),
            incomplete=totals["incomplete"],
            prompt_tokens=number(metrics["prompt_token_count"]["successful"]["mean"]),
        ),
    )


def _why_nothing(benchmark: dict[str, Any], load: Load) -> str:
    reason = _first_error(benchmark)
    if reason:
        return f"all {len(benchmark['requests']['errored'])} requests failed: {reason}"
    return (
        f"too slow: no request was completed in the {load.seconds:g} s; "
        "give it more seconds or fewer output_tokens"
    )


def _first_error(benchmark: dict[str, Any]) -> str | None:
    """Why the first of the failed requests failed; None where none did."""
    failed = benchmark["requests"]["errored"]
    if not failed:
        return None
    return str(failed[0]["info"].get("error") or "no reason given").splitlines()[0][:300]


def _scenario(target: Target, load: Load, report: Path) -> dict[str, Any]:
    """GuideLLM's own configuration; the API key is not in it but in the environment."""
    return {
        "spec": {
            "backend": {
                "kind": "openai_http",
                "target": target.url,
                "model": target.model_name,
                "request_format": "/v1/completions",
                "extras": {"headers": _ONE_REQUEST},
            },
            "tokenizer": _tokenizer(target.model),
            "data": [
                {
                    "kind": "synthetic_text",
                    "prompt_tokens": load.prompt_tokens,
                    "output_tokens": load.output_tokens,
                }
            ],
            "profile": {
                "kind": "concurrent",
                "streams": load.concurrency[0],
                "warmup": {"mode": "duration", "value": load.warmup_seconds},
            },
            "constraints": [
                {"kind": "max_duration", "seconds": load.warmup_seconds + load.seconds}
            ],
            "seed": {"kind": "static", "value": _SEED},
            "outputs": [{"kind": "json", "path": str(report)}],
        },
        "benchmarks": [{"profile.streams": streams} for streams in load.concurrency],
    }


def _tokenizer(model: Model) -> dict[str, Any]:
    """The tokenizer files beside the weights, or the tokenizer inside a bare GGUF."""
    directory = tokenizer_directory(model)
    described: dict[str, Any] = {"kind": "huggingface_auto", "model": str(directory)}
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        described["load_kwargs"] = {"gguf_file": model.weights.name}
    return described
