from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.engines.process import free_port
from quantkit.spec import Spec
from quantkit.variant import Variant, open_variant
from tests.integration.gateways import QUANTKIT
from tests.integration.servers import PATIENCE, tree, wait_until_gone


@pytest.fixture(scope="module")
def variant(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    out = tmp_path_factory.mktemp("variants")
    return convert(Checkpoint.open(tiny_llama), Spec("gguf", "Q8_0"), None, out)


@dataclass(frozen=True)
class Serving:
    process: subprocess.Popen[str]
    port: int
    said: list[str]
    """Lines on stderr up to the curl example."""

    def family(self) -> list[psutil.Process]:
        return tree(self.process.pid)[1:]

    @property
    def curl(self) -> str:
        return next(line for line in self.said if line.startswith("curl "))


@contextlib.contextmanager
def serving(variant: Variant, *options: str, **env: str) -> Iterator[Serving]:
    """``quantkit serve`` as a user runs it, once it says that it is ready."""
    port = free_port()
    process = subprocess.Popen(
        [*QUANTKIT, "serve", str(variant.path), "--port", str(port), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )
    with process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line.rstrip())
                if line.startswith("curl "):
                    break
            assert said[-1].startswith("curl "), said
            yield Serving(process, port, said)
        finally:
            process.kill()


def test_serves_until_ctrl_c(variant: Variant) -> None:
    with serving(variant) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        assert f"ready: {url}" in server.said
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model=variant.id, messages=[{"role": "user", "content": "Hello"}], max_tokens=5
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        # Nothing stands between: routes that no gateway passes on are there.
        assert httpx.get(f"http://127.0.0.1:{server.port}/props").json()["total_slots"] == 4
        family = server.family()
        assert any("llama-server" in p.name() for p in family)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0
        wait_until_gone(family)


def test_a_name_with_commas_is_one_name(variant: Variant, tmp_path: Path) -> None:
    """llama-server by itself would know this one by two."""
    path = shutil.copytree(variant.path, tmp_path / "tiny,fast")
    with serving(open_variant(path)) as server:
        client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["tiny-fast"]
        for name in ("tiny-fast", "tiny,fast"):
            answer = client.completions.create(model=name, prompt="x", max_tokens=1)
            assert answer.model == "tiny-fast"


def test_the_curl_that_it_prints_works(variant: Variant) -> None:
    with serving(variant, QUANTKIT_API_KEY="s3cret") as server:
        for process in [psutil.Process(server.process.pid), *server.family()]:
            assert "s3cret" not in " ".join(process.cmdline())
        command = ["bash", "-c", server.curl.replace("curl ", "curl -s ", 1)]
        refused = subprocess.check_output(command, env=os.environ | {"API_KEY": "wrong"})
        assert "error" in json.loads(refused)
        answered = subprocess.check_output(command, env=os.environ | {"API_KEY": "s3cret"})
        assert json.loads(answered)["choices"][0]["message"]["role"] == "assistant"
        assert shlex.split(server.curl)[0] == "curl"


def test_when_the_engine_dies_so_does_serve(variant: Variant) -> None:
    with serving(variant) as server:
        engine = next(p for p in server.family() if "llama-server" in p.name())
        engine.kill()
        assert server.process.wait(PATIENCE) == 128 + signal.SIGKILL


def test_nothing_is_left_when_serve_is_killed(variant: Variant) -> None:
    with serving(variant) as server:
        family = server.family()
        server.process.kill()
        wait_until_gone(family)


def refused(variant: Variant, *options: str) -> str:
    """stderr of a ``quantkit serve`` that must end by itself, with exit code 2 and one line."""
    done = subprocess.run(
        [*QUANTKIT, "serve", str(variant.path), *options],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_port_in_use(variant: Variant) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        said = refused(variant, "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said
    assert "choose another with --port" in said


def test_an_open_address_demands_a_key(variant: Variant) -> None:
    assert "give --api-key" in refused(variant, "--host", "0.0.0.0")


def test_engine_not_installed(
    variant: Variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path))
    source = Variant("source", tiny_llama, "safetensors", "bf16", None)
    assert "vllm: not installed; run: quantkit engines install vllm" in refused(source)
