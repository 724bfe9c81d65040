"""The server under load: how it is started to fit the loads, and what is known of it then."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from quantkit.benchmark import guidellm
from quantkit.benchmark.generator import Client
from quantkit.benchmark.guidellm import Target
from quantkit.benchmark.options import BenchOptions
from quantkit.engines.base import ServingEngine, config_of
from quantkit.engines.process import Process, RunningServer, free_port, launched
from quantkit.engines.server import ServeOptions, ServerCommand
from quantkit.errors import EngineError
from quantkit.ledger import Sample
from quantkit.models.engine_config import EngineConfig
from quantkit.models.variant import Model
from quantkit.system.memory import PeakMemory
from quantkit.system.progress import say

PROMPT = "The capital of France is"
SAMPLE_TOKENS = 24

_HOST = "127.0.0.1"
_NAME = "model"
"""The model's name in the API; the same for every engine and variant."""


@dataclass(frozen=True)
class Served:
    """A server that answers, and what is known of it."""

    running: RunningServer
    engine: EngineConfig
    startup_seconds: float
    load_seconds: float | None
    memory: PeakMemory
    sample: Sample
    protocol: dict[str, Any]

    @property
    def process(self) -> Process:
        """The server's own."""
        return self.running.process

    @property
    def key(self) -> dict[str, Any]:
        """What a kept repetition depends on, beside its load."""
        return {"engine": str(self.engine), **self.protocol}

    def target(self, model: Model) -> Target:
        """Where the load generator finds it."""
        url = f"http://{self.running.host}:{self.running.port}"
        return Target(url, self.running.model_name, model)

    def check(self) -> None:
        """Raise EngineError where the server has ended."""
        if self.process.exit_code is not None:
            raise self.process.error(f"ended with exit code {self.process.exit_code} under load")


class Servers:
    """The servers of one model, by engine: each is started when it is first asked for, and once.

    One runs at a time, and none when the block is left. Logs go into ``work``; ``longest``: tokens
    of a request beside the loads, None where there is none.
    """

    def __init__(
        self,
        model: Model,
        options: BenchOptions,
        work: Path,
        client: Client,
        longest: int | None = None,
    ) -> None:
        self.model = model
        self.options = options
        self.client = client
        self._work = work
        self._longest = longest
        self._stack = ExitStack()
        self._found: dict[EngineConfig, Served | EngineError] = {}
        """The server of the engine that was asked for last."""

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def on(self, engine: ServingEngine) -> Served:
        """The model on this engine; raise EngineError where it did not start, or has ended."""
        config = config_of(engine)
        if config not in self._found:
            self._stack.close()
            try:
                self._found = {config: self._stack.enter_context(self._started(engine))}
            except EngineError as error:
                self._found = {config: error}
        found = self._found[config]
        if isinstance(found, EngineError):
            raise found
        found.check()
        return found

    def _started(self, engine: ServingEngine) -> AbstractContextManager[Served]:
        self._work.mkdir(parents=True, exist_ok=True)
        name = f"{self.model.id}-{config_of(engine).id}"
        log = self._work / f"{re.sub(r'[^-.0-9A-Za-z_]+', '-', name)}-server.log"
        return _started(self.model, engine, self.options, self.client.key, self._longest, log)


@contextmanager
def _started(
    model: Model,
    engine: ServingEngine,
    options: BenchOptions,
    key: str,
    longest: int | None,
    log: Path,
) -> Iterator[Served]:
    """``model`` on ``engine`` while the block runs, with slots and context for the loads.

    Raise EngineError where it does not start or refuses a completion.
    """
    port = free_port(_HOST)
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
            longest=longest,
        ),
    )
    say(f"{model.id}: starting {config_of(engine)}")
    with (
        launched(engine.name, command.argv, command.env, log) as process,
        process.watch_memory() as memory,
    ):
        startup = process.wait_ready(_HOST, port, command)
        say(f"{model.id}: {config_of(engine)} ready after {startup:.0f} s")
        running = RunningServer(process, _HOST, port, key, _NAME)
        yield Served(
            running=running,
            engine=config_of(engine),
            startup_seconds=startup,
            load_seconds=engine.load_seconds(log.read_text(errors="replace")),
            memory=memory,
            sample=_sample(running),
            protocol={
                **options.protocol(),
                "load_generator": guidellm.version(),
                "server": _without_port(command, port),
                "environment": {k: v for k, v in command.env.items() if "API_KEY" not in k},
            },
        )


def _sample(server: RunningServer) -> Sample:
    """What the model writes after ``PROMPT``, greedily."""
    body = {"model": _NAME, "prompt": PROMPT, "max_tokens": SAMPLE_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"http://{server.host}:{server.port}/v1/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"},
    )
    # Loopback: a proxy that the environment names must not come between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        raise EngineError(
            f"{server.process.name} refused a completion: {error.code} {said}"
        ) from error
    except (OSError, ValueError) as error:
        raise server.process.error(f"did not answer a completion ({error})") from error
    return Sample(prompt=PROMPT, completion=answer["choices"][0]["text"])


def _without_port(command: ServerCommand, port: int) -> list[str]:
    """The command line as it is the same for every start."""
    return ["PORT" if word == str(port) else word for word in command.argv]
