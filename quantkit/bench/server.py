"""The server under load: how it is started to fit the loads, and what is known of it then."""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.bench import guidellm
from quantkit.bench.guidellm import Target
from quantkit.bench.options import BenchOptions
from quantkit.engines.base import Engine, ServeOptions, ServerCommand, label
from quantkit.engines.process import Process, free_port, launched
from quantkit.errors import EngineError
from quantkit.ledger import Sample
from quantkit.memory import PeakMemory
from quantkit.progress import say
from quantkit.variant import Model

PROMPT = "The capital of France is"
SAMPLE_TOKENS = 24

_HOST = "127.0.0.1"
_NAME = "model"
"""Under which name the API offers what is measured; the same for every engine and variant."""


@dataclass(frozen=True)
class Served:
    """A server that answers, and what is known of it."""

    target: Target
    process: Process
    engine: str
    """Name and version."""
    startup_seconds: float
    load_seconds: float | None
    memory: PeakMemory
    sample: Sample
    protocol: dict[str, Any]

    @property
    def key(self) -> dict[str, Any]:
        """What a kept repetition depends on, beside its load."""
        return {"engine": self.engine, **self.protocol}

    def check(self) -> None:
        """Raise EngineError where the server has ended."""
        if self.process.exit_code is not None:
            raise self.process.error(f"ended with exit code {self.process.exit_code} under load")


@contextmanager
def served(model: Model, engine: Engine, options: BenchOptions, stem: Path) -> Iterator[Served]:
    """``model`` on ``engine`` while the block runs, with slots and context for the loads.

    Raise EngineError where it does not start or refuses a completion.
    """
    port, key = free_port(_HOST), secrets.token_hex(16)
    command = engine.server(
        model,
        ServeOptions(
            port=port,
            host=_HOST,
            api_key=key,
            context=options.workload.context,
            slots=options.slots,
            model_name=_NAME,
            prefix_cache=options.prefix_cache,
        ),
    )
    log = stem.with_name(f"{stem.name}-server.log")
    say(f"{model.id}: starting {label(engine)}")
    with (
        launched(engine.name, command.argv, command.env, log) as process,
        process.watch_memory() as memory,
    ):
        startup = process.wait_ready(_HOST, port, command)
        say(f"{model.id}: {label(engine)} ready after {startup:.0f} s")
        url = f"http://{_HOST}:{port}"
        yield Served(
            target=Target(url, key, _NAME, model),
            process=process,
            engine=label(engine),
            startup_seconds=startup,
            load_seconds=engine.load_seconds(log.read_text(errors="replace")),
            memory=memory,
            sample=_sample(url, key, process),
            protocol={
                **options.protocol(),
                "load_generator": guidellm.version(),
                "server": _without_port(command, port),
                "environment": {k: v for k, v in command.env.items() if "API_KEY" not in k},
            },
        )


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
