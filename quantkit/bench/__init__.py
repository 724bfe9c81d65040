"""What a serving engine delivers: start the real server, ask it something, put it under load.

The figures are GuideLLM's; ``quantkit.bench.guidellm`` says what each of them means.
"""

from __future__ import annotations

import json
import re
import secrets
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import engines
from quantkit.bench import guidellm
from quantkit.bench.summary import summary
from quantkit.engines.base import ServeOptions, ServerCommand, label
from quantkit.engines.process import Process, free_port, launched
from quantkit.errors import EngineError, RecipeError
from quantkit.ledger import Sample
from quantkit.load import Bench
from quantkit.progress import say
from quantkit.variant import Model

PROMPT = "The capital of France is"
SAMPLE_TOKENS = 24

_HOST = "127.0.0.1"
_NAME = "model"
"""Under which name the API offers what is measured; the same for every engine and variant."""


@dataclass(frozen=True)
class BenchOptions:
    """The load: at each concurrency, requests of a fixed length one after the other.

    ``seconds`` are measured after ``warmup_seconds`` of the same load at each level.
    """

    concurrency: tuple[int, ...] = (1, 4)
    prompt_tokens: int = 128
    output_tokens: int = 32
    seconds: float = 15.0
    warmup_seconds: float = 2.0
    engine: str | None = None
    """The first engine that serves the model's format, where None."""

    def __post_init__(self) -> None:
        levels = self.concurrency
        if not levels or min(levels) < 1 or len(set(levels)) != len(levels):
            raise RecipeError(f"concurrency {list(levels)}: expected different numbers from 1 on")
        if min(self.prompt_tokens, self.output_tokens - 1) < 1 or self.seconds <= 0:
            raise RecipeError(
                "bench: prompt_tokens must be 1 or more, output_tokens 2 or more, seconds above 0"
            )


@dataclass(frozen=True)
class BenchResult:
    """One ``Bench`` for each concurrency, and what the server wrote before the load."""

    benches: list[Bench]
    sample: Sample


def bench(model: Model, options: BenchOptions, work: Path) -> BenchResult:
    """Measure ``model`` on its serving engine; logs and GuideLLM's report go into ``work``,
    under the model's id.

    Raise ToolchainError or IncompatibleVariant before anything is started, EngineError where the
    server fails or a level completes no request.
    """
    engine = engines.serving_engine(model, options.engine)
    engine.check(model)
    work.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", model.id)
    port, key = free_port(_HOST), secrets.token_hex(16)
    # A quarter more than the lengths: a prompt is text, and text can come out a little longer.
    tokens = max(options.prompt_tokens + options.output_tokens, 128)
    serve_options = ServeOptions(
        port=port,
        host=_HOST,
        api_key=key,
        context=-(-tokens * 5 // 4 // 64) * 64,
        slots=max(options.concurrency),
        model_name=_NAME,
        prefix_cache=False,
    )
    command = engine.server(model, serve_options)
    engine_label = label(engine)
    say(f"{model.id}: starting {engine_label}")
    with (
        launched(engine.name, command.argv, command.env, work / f"{stem}-server.log") as server,
        server.watch_memory() as memory,
    ):
        startup = server.wait_ready(_HOST, port, command)
        levels = ", ".join(map(str, options.concurrency))
        say(f"{model.id}: {engine_label} ready after {startup:.0f} s; load at concurrency {levels}")
        url = f"http://{_HOST}:{port}"
        sample = _sample(url, key, server)
        target = guidellm.Target(url, key, _NAME, model)
        load = guidellm.Load(
            options.concurrency,
            options.prompt_tokens,
            options.output_tokens,
            options.seconds,
            options.warmup_seconds,
        )
        measured = guidellm.drive(target, load, work / f"{stem}-guidellm")
    protocol = {
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "seconds": options.seconds,
        "warmup_seconds": options.warmup_seconds,
        "load_generator": guidellm.version(),
        "server": _without_port(command, port),
        "environment": {k: v for k, v in command.env.items() if not k.endswith("API_KEY")},
    }
    benches = [
        Bench(
            engine=engine_label,
            concurrency=level.concurrency,
            **summary([level.reading]),
            startup_seconds=startup,
            peak_rss_bytes=memory.peak_bytes,
            protocol=protocol,
        )
        for level in measured
    ]
    return BenchResult(benches, sample)


def _sample(url: str, key: str, server: Process) -> Sample:
    """What the model writes after ``PROMPT``, greedily."""
    body = {"model": _NAME, "prompt": PROMPT, "max_tokens": SAMPLE_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    # Loopback: a proxy that the environment names must not come between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        raise EngineError(f"{server.name} refused a completion: {error.code} {said}") from error
    except (OSError, ValueError) as error:
        raise server.error(f"did not answer a completion ({error})") from error
    return Sample(prompt=PROMPT, completion=answer["choices"][0]["text"])


def _without_port(command: ServerCommand, port: int) -> list[str]:
    """The command line as it is the same for every start."""
    return ["PORT" if word == str(port) else word for word in command.argv]
