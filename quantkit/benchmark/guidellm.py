"""GuideLLM's side of a load: the scenario that it runs, and how it is found and named.

What its figures are, as read in its source (0.8.1) and checked against a server with known times in
``tests/integration/test_bench_load.py``:

- Throughput counts in a window that opens after the warm-up and closes when the time is up. Tokens
  of requests that the end cuts off are counted as they come (``total``): of completed requests
  alone (``successful``) a short window would lose up to one request a stream.
- Time to first token is from sending the request to the first piece of text, one value a request.
- Inter-token latency is one value a request too, (last - first token) / (tokens - 1), weighted by
  tokens: its percentiles are over requests and do not show a single slow token.
- Of an open loop it gives the same figures of the requests that were *answered* in the window. Here
  they are computed from its times of each request instead, over those that were *due* in it
  (``quantkit.benchmark.requests``).
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from quantkit.benchmark.loads import Closed, Load, Times, Workload
from quantkit.models.variant import Model, tokenizer_directory

_SEED = 20260101
_OWN_PROMPTS = 4096
"""Lines of the prompt file, the user's own repeated: more than one repetition sends."""
_ONE_REQUEST = {"Connection": "close"}
"""Each request has its own connection: llama-server drops kept ones after a streamed answer, and a
client that has already sent its next request gets an error (6 % of requests, in a loop that did
nothing else)."""
ENVIRONMENT = {
    # One worker, an event loop, keeps up with these loads; where it does not, that is seen.
    "GUIDELLM__MAX_WORKER_PROCESSES": "1",
    "GUIDELLM__MP_CONTEXT_TYPE": "forkserver",
    "GUIDELLM__SCHEDULER_START_DELAY_NON_DISTRIBUTED": "0.3",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_PROXY": "127.0.0.1",
}


@dataclass(frozen=True)
class Target:
    """What to send requests to; prompts are made with the model's own tokenizer."""

    url: str
    model_name: str
    model: Model


def version() -> str:
    """Name and version of the load generator."""
    return f"guidellm {importlib.metadata.version('guidellm')}"


def scenario(
    target: Target, workload: Workload, load: Load, times: Times, number: int, stem: Path
) -> dict[str, Any]:
    """GuideLLM's configuration of one load; the API key is not in it but in the environment.

    ``number``: no two loads of a server get the same, so that none asks what another has asked:
    a cache of prompts is of no use. Files that GuideLLM reads and writes begin with ``stem``.
    """
    return {
        "spec": {
            "backend": {
                "kind": "openai_http",
                "target": target.url,
                "model": target.model_name,
                "request_format": "/v1/completions",
                "extras": {"headers": _ONE_REQUEST},
            },
            "tokenizer": tokenizer(target.model),
            "data": [_data(workload, number, stem)],
            "profile": _profile(load, times),
            "constraints": [{"kind": "max_duration", "seconds": times.total}],
            "seed": {"kind": "static", "value": _SEED + number},
            "outputs": [{"kind": "json", "path": f"{stem}-guidellm.json"}],
        },
        "benchmarks": [None],
    }


def _profile(load: Load, times: Times) -> dict[str, Any]:
    if isinstance(load, Closed):
        warmup = {"mode": "duration", "value": times.warmup}
        return {"kind": "concurrent", "streams": load.concurrency, "warmup": warmup}
    # All requests of the load may be waiting at the same time; more are never needed.
    most = max(8, int(load.rate_per_s * times.total * 2))
    return {"kind": load.arrivals, "rate": load.rate_per_s, "max_concurrency": most}


def _data(workload: Workload, number: int, stem: Path) -> dict[str, Any]:
    if not workload.texts:
        return {
            "kind": "synthetic_text",
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
        }
    texts = list(workload.texts)
    Random(_SEED + number).shuffle(texts)
    path = stem.with_name(f"{stem.name}-prompts.jsonl")
    lines = (
        json.dumps({"prompt": text, "output_tokens_count": workload.output_tokens}) + "\n"
        for text in islice(cycle(texts), max(len(texts), _OWN_PROMPTS))
    )
    path.write_text("".join(lines), encoding="utf-8")
    return {"kind": "json_file", "path": str(path)}


def tokenizer(model: Model) -> dict[str, Any]:
    """The tokenizer files beside the weights, or the tokenizer inside a bare GGUF."""
    directory = tokenizer_directory(model)
    described: dict[str, Any] = {"kind": "huggingface_auto", "model": str(directory)}
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        described["load_kwargs"] = {"gguf_file": model.weights.name}
    return described
