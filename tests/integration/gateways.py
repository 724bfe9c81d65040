"""A gateway for tests, as a user starts it, what it says, and clients that stay a while."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import yaml
from openai import OpenAI

from quantkit.engines.process import free_port
from tests.integration.servers import PATIENCE, tree

KEY = "a-key-of-tests"
QUANTKIT = [sys.executable, "-c", "from quantkit.cli.main import main; main()"]
LENGTH = 60_000
"""Tokens that no machine computes while a test looks on; what asks for them must be ended."""
CONTEXT = 1 << 16
"""A context that holds them, of the models of ``patient_llama``."""
ENDLESS = {"prompt": "the list", "max_tokens": LENGTH, "ignore_eos": True}


@dataclass
class Stream:
    """The answer of a client that reads in a thread of its own."""

    id: str
    """Of the request, in the gateway's log."""
    lines: list[str] = field(default_factory=list)
    """What has come so far, without the empty lines."""
    leaving: bool = False
    """Set to close the connection."""
    ended: threading.Event = field(default_factory=threading.Event)

    def until_more(self, lines: int = 1) -> None:
        """Until so many more lines have come."""
        wanted = len(self.lines) + lines
        wait_until(lambda: len(self.lines) >= wanted or self.ended.is_set())
        assert len(self.lines) >= wanted, self.lines[-3:]

    def rest(self) -> list[str]:
        """All lines, once the answer has ended without the client's doing."""
        assert self.ended.wait(PATIENCE)
        return self.lines


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def http(self, key: str = KEY) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False)

    def post(self, model: str, **extra: Any) -> httpx.Response:
        """A completion of two tokens, unless ``extra`` says otherwise."""
        with self.http() as http:
            body = {"model": model, "prompt": "x", "max_tokens": 2, **extra}
            return http.post("/v1/completions", json=body)

    @contextlib.contextmanager
    def streaming(self, model: str, **extra: Any) -> Iterator[Stream]:
        """An endless answer, unless ``extra`` says otherwise: it has begun when the block begins;
        the client leaves when the block ends."""
        stream = Stream(uuid.uuid4().hex)

        def read() -> None:
            body = {**ENDLESS, "model": model, "stream": True, **extra}
            headers = {"X-Request-Id": stream.id}
            try:
                with (
                    self.http() as http,
                    http.stream("POST", "/v1/completions", json=body, headers=headers) as answer,
                ):
                    for line in answer.iter_lines():
                        if line:
                            stream.lines.append(line)
                        if stream.leaving:
                            return
            finally:
                stream.ended.set()

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            try:
                stream.until_more()
                yield stream
            finally:
                stream.leaving = True
            reading.result(PATIENCE)

    def events(self, what: str | None = None) -> list[dict[str, Any]]:
        """The lines of its log, of one kind or of all."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [e for e in map(json.loads, lines) if what in (None, e["event"])]

    def wait_for(self, what: str, **facts: Any) -> dict[str, Any]:
        """The log's first line of a kind with these facts, once there is one."""

        def found() -> list[dict[str, Any]]:
            return [e for e in self.events(what) if facts.items() <= e.items()]

        wait_until(found, self.log.read_text)
        return found()[0]

    def until(self, name: str, value: float, pause: float = 0.02, **labels: str) -> None:
        """Until a metric has this value; ``pause``: seconds between two looks."""
        wait_until(
            lambda: self.metric(name, **labels) == value,
            lambda: f"{name} is {self.metric(name, **labels)}, not {value}",
            pause,
        )

    def engines(self) -> dict[str, psutil.Process]:
        """The engines' processes by the name of their backend."""
        found = {}
        for process in tree(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = process.cmdline()
                for option in ("--alias", "--served-model-name"):
                    if option in words and "supervisor.py" not in " ".join(words):
                        found[words[words.index(option) + 1]] = process
        return found

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        with self.http() as http:
            text = http.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def wait_until(
    holds: Callable[[], object], seen: Callable[[], str] = str, pause: float = 0.02
) -> None:
    """Return once something holds; fail, with what is seen instead, where it never does."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, seen()
        time.sleep(pause)


@contextlib.contextmanager
def gateway(
    work: Path,
    config: Mapping[str, Any] | None = None,
    *words: str,
    stderr: IO[bytes] | None = None,
    **env: str,
) -> Iterator[Running]:
    """``quantkit serve`` of a configuration or of words, once it listens; with ``KEY``."""
    port = free_port()
    log = work / f"gateway-{port}.log"
    if config is not None:
        file = work / f"gateway-{port}.yaml"
        file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        words = ("--config", str(file), *words)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*QUANTKIT, "serve", *words, "--port", str(port)],
            stderr=stderr or output,
            env={**os.environ, "QUANTKIT_API_KEY": KEY, "QUANTKIT_HOME": str(work / "home"), **env},
        )
    try:
        wait_until(lambda: process.poll() is not None or _answers(port), log.read_text)
        assert process.poll() is None, log.read_text()
        yield Running(process, port, log)
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except OSError:
        return False
    return True
