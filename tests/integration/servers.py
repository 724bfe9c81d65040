"""A served model for tests, and what is left of one."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from openai import OpenAI

from quantkit import engines
from quantkit.engines.process import Process, free_port, launched
from quantkit.engines.server import ServeOptions
from quantkit.models.tokenizer import load_tokenizer
from quantkit.models.variant import Model

KEY = "a-key-of-tests"
PATIENCE = 300.0
"""Seconds after which what a test waits for will not happen; no test takes longer for that."""


@dataclass(frozen=True)
class Running:
    port: int
    process: Process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


@contextlib.contextmanager
def running(model: Model, log: Path, *, prefix_cache: bool = False) -> Iterator[Running]:
    """``model`` on its serving engine, under the name ``m``, 4 slots of 256 tokens."""
    engine = engines.serving_engine(model)
    options = ServeOptions(
        port=free_port(),
        api_key=KEY,
        context=256,
        slots=4,
        model_name="m",
        prefix_cache=prefix_cache,
    )
    command = engine.server(model, options)
    with launched(engine.name, command.argv, command.env, log) as process:
        process.wait_ready("127.0.0.1", options.port, command)
        yield Running(options.port, process)


def assert_agrees(
    variant: Model, log: Path, reference: Model | None = None, tolerance: float = 0.15
) -> None:
    """The serving engine computes what was evaluated: the unpacked weights in transformers, or
    those of another ``reference``.

    The log-probability of the engine's greedy tokens, in bf16, next to the reference's in float32.
    """
    tokenizer = load_tokenizer(variant.path)
    prompt = tokenizer("The value of the expression is a list of objects").input_ids
    with running(variant, log) as server:
        answer = server.client().completions.create(
            model="m",
            prompt=prompt,
            max_tokens=8,
            temperature=0,
            logprobs=1,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    choice = answer.choices[0].model_dump()
    written = choice["token_ids"]
    told = choice["logprobs"]["token_logprobs"]
    assert len(written) == len(told) == 8
    with engines.load_engine("transformers").scorer(reference or variant, 256) as scorer:
        (logits,) = scorer.logits([[*prompt, *written]], [len(prompt) - 1])
    expected = logits.log_softmax(-1)
    for position, (token, logprob) in enumerate(zip(written, told, strict=True)):
        assert math.isclose(float(expected[position, token]), logprob, abs_tol=tolerance)
        assert float(expected[position].max() - expected[position, token]) < tolerance


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its children, to ask later whether they are gone."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def wait_until_gone(processes: list[psutil.Process], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while left := [p for p in processes if _lives(p)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
