"""A gateway for tests, as a user starts it, and what it says."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import yaml
from openai import OpenAI

from quantkit.engines.process import free_port
from tests.integration.servers import tree

KEY = "a-key-of-tests"
QUANTKIT = [sys.executable, "-c", "from quantkit.cli import main; main()"]
STREAM = {"prompt": "the list", "max_tokens": 1900, "stream": True, "ignore_eos": True}
"""Some seconds of work for the tiny model."""


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, key: str = KEY) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def events(self, what: str | None = None) -> list[dict[str, Any]]:
        """The lines of its log, of one kind or of all."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [e for e in map(json.loads, lines) if what in (None, e["event"])]

    def wait_for(self, what: str, count: int = 1, seconds: float = 20, **facts: Any) -> None:
        """Until the log has so many lines of a kind, with these facts."""
        deadline = time.monotonic() + seconds
        while True:
            events = [e for e in self.events(what) if facts.items() <= e.items()]
            if len(events) >= count:
                return
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def until(self, name: str, value: float, **labels: str) -> None:
        """Until a metric has this value."""
        deadline = time.monotonic() + 20
        while self.metric(name, **labels) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name, **labels)}"
            time.sleep(0.02)

    def engines(self) -> dict[str, psutil.Process]:
        """The engines' processes by the name of their backend."""
        found = {}
        for process in tree(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = process.cmdline()
                if words and words[0].endswith("llama-server"):
                    found[words[words.index("--alias") + 1]] = process
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
        wait_until_live(process, port, log)
        yield Running(process, port, log)
    finally:
        process.kill()
        process.wait()


def wait_until_live(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 30
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(OSError):
            opener.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.05)
