"""One variant, as most people serve it: ready when it answers, and ended with the reason where it
cannot be loaded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from quantkit.engines.process import free_port
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert
from tests.integration.faulty import STARVED, llama_server
from tests.integration.gateways import QUANTKIT, Running, gateway, wait_until
from tests.integration.odd_requests import CALL
from tests.integration.servers import PATIENCE, tree, wait_until_gone
from tests.models import make_checkpoint

USER: Any = {"role": "user", "content": "Hello"}
NO_KEY = {"QUANTKIT_API_KEY": ""}


@pytest.fixture(scope="module")
def variant(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    out = tmp_path_factory.mktemp("variants")
    return convert(Checkpoint.open(tiny_llama), Spec("gguf", "Q8_0"), None, out)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_server(tmp_path_factory.mktemp("program"), free_port())


@pytest.fixture(scope="module")
def served(variant: Variant, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(variant.path, tmp_path_factory.mktemp("one")) as found:
        yield found


@contextlib.contextmanager
def serving(path: Path, work: Path, *options: str, **env: str) -> Iterator[Running]:
    """``quantkit serve PATH`` as a user runs it, once it says that it is ready."""
    with gateway(work, None, str(path), *options, **env) as found:
        wait_until(lambda: found.process.poll() is not None or "curl" in said(found))
        assert found.process.poll() is None, found.log.read_text()
        yield found


def said(served: Running) -> list[str]:
    """The first word of each line that is for a person."""
    lines = served.log.read_text().splitlines()
    return [line.split()[0] for line in lines if line and not line.startswith("{")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serves_until_it_is_asked_to_end(
    variant: Variant, tmp_path: Path, number: signal.Signals
) -> None:
    with serving(variant.path, tmp_path, **NO_KEY) as served:
        lines = served.log.read_text().splitlines()
        (answers,) = [n for n, line in enumerate(lines) if '"engine ready"' in line]
        assert lines.index(f"ready: {served.url}/v1") > answers
        family = tree(served.process.pid)
        assert any("llama-server" in p.name() for p in family)
        answer = served.openai("none").chat.completions.create(
            model=variant.id, messages=[USER], max_tokens=5
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0
        served.process.send_signal(number)
        assert served.process.wait(PATIENCE) == 0
        wait_until_gone(family)
    assert served.log.read_text().endswith("stopped\n")


def test_the_model_by_its_name(served: Running, variant: Variant) -> None:
    models = served.openai().models
    assert [models.retrieve(variant.id)] == list(models.list())
    with pytest.raises(openai.NotFoundError, match="no model 'x' here"):
        models.retrieve("x")


@pytest.mark.parametrize("path", ["/props", "/slots", "/apply-template", "/completion", "/v1/x"])
def test_other_routes_of_the_engine_are_closed(served: Running, path: str) -> None:
    with served.http() as http:
        assert http.get(path).status_code == http.post(path, json={}).status_code == 404


@pytest.mark.parametrize(
    ("message", "encoding"),
    [
        ({"role": "assistant", "tool_calls": [CALL | {"id": None}]}, "utf-8"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "utf-8"),
        ({"role": "user", "content": "\ud800"}, "utf-8"),
        (USER, "utf-16"),
    ],
)
def test_what_the_engine_cannot_read(
    served: Running, variant: Variant, message: Any, encoding: str
) -> None:
    body = json.dumps({"model": variant.id, "messages": [USER, message]}).encode(encoding)
    with served.http() as http:
        headers = {"Content-Type": "application/json"}
        answer = http.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_usage_is_of_all_choices(served: Running, variant: Variant) -> None:
    answer = served.openai().chat.completions.create(
        model=variant.id, messages=[USER], max_tokens=7, n=2, extra_body={"ignore_eos": True}
    )
    assert len(answer.choices) == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 14


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "plain")
    path = source / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    plain = convert(Checkpoint.open(source), Spec("gguf", "Q8_0"), None, tmp_path / "out")
    with serving(plain.path, tmp_path) as served:
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            served.openai().chat.completions.create(model=plain.id, messages=[USER])
        assert served.post(plain.id).status_code == 200


def test_a_name_with_commas_is_one_name(variant: Variant, tmp_path: Path) -> None:
    """llama-server by itself would know this one by two."""
    path = shutil.copytree(variant.path, tmp_path / "tiny,fast")
    with serving(path, tmp_path, "--alias", "quick=tiny,fast") as served:
        assert [model.id for model in served.openai().models.list()] == ["tiny,fast", "quick"]
        for name in ("tiny,fast", "quick"):
            assert served.post(name).json()["model"] == "tiny-fast"


def test_the_curl_that_it_prints_works(variant: Variant, tmp_path: Path) -> None:
    with serving(variant.path, tmp_path, QUANTKIT_API_KEY="s3cret") as served:
        for process in tree(served.process.pid):
            assert "s3cret" not in " ".join(process.cmdline())
        (curl,) = [n for n in served.log.read_text().splitlines() if n.startswith("curl ")]
        command = ["bash", "-c", curl.replace("curl ", "curl -s ", 1)]
        refused = subprocess.check_output(command, env=os.environ | {"API_KEY": "wrong"})
        assert "error" in json.loads(refused)
        answered = subprocess.check_output(command, env=os.environ | {"API_KEY": "s3cret"})
        assert json.loads(answered)["choices"][0]["message"]["role"] == "assistant"


def test_an_engine_that_dies_is_restarted(served: Running, variant: Variant) -> None:
    engine = served.engines()[variant.id]
    engine.kill()
    assert served.post(variant.id).status_code == 200
    assert served.engines()[variant.id] != engine
    assert served.process.poll() is None


def test_ctrl_c_while_it_loads(variant: Variant, program: Path, tmp_path: Path) -> None:
    """It listens already, says that it is not ready, and leaves nothing."""
    path = shutil.copytree(variant.path, tmp_path / "hangs")
    server = {"QUANTKIT_LLAMA_SERVER": str(program)}
    with gateway(tmp_path, None, str(path), **server) as served:
        served.wait_for("engine starting")
        with served.http() as http:
            assert http.get("/health/live").status_code == 200
            assert http.get("/health/ready").status_code == 503
        family: list[psutil.Process] = []
        while "sleep" not in [p.name() for p in family]:  # which that engine has become
            family = tree(served.process.pid)
        assert said(served) == []
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(PATIENCE) == 0
        wait_until_gone(family)


def ended(path: Path, *options: str, **env: str) -> str:
    """stderr of a ``quantkit serve`` that must end by itself, with exit code 2."""
    done = subprocess.run(
        [*QUANTKIT, "serve", str(path), *options],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "ready: http" not in done.stderr
    return done.stderr


def test_a_model_that_cannot_be_loaded(variant: Variant, tmp_path: Path) -> None:
    """The last line has llama-server's own reason, and where its output is."""
    path = tmp_path / "damaged.gguf"
    path.write_bytes(variant.weights.read_bytes()[:-100_000])
    port = free_port()
    told = ended(path, "--port", str(port), QUANTKIT_HOME=str(tmp_path)).splitlines()[-1]
    log = tmp_path / "logs" / f"serve-{port}" / "damaged.log"
    assert told.startswith("quantkit: llamacpp ended with exit code 1 before it was ready: ")
    assert "failed to load model" in told
    assert told.endswith(f"; see {log}")
    assert log.is_file()


def test_a_context_that_does_not_fit(
    patient_llama: dict[str, Path], program: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(patient_llama["Q8_0"], tmp_path / "starved")
    slots, context = str(STARVED["slots"]), str(STARVED["context"])
    env = {"QUANTKIT_HOME": str(tmp_path), "QUANTKIT_LLAMA_SERVER": str(program)}
    options = ("--port", str(free_port()), "--slots", slots, "--context", context)
    told = ended(path, *options, **env).splitlines()[-1]
    assert "alloc" in told
    assert told.endswith("starved.log")


def refused(path: Path, *options: str, **env: str) -> str:
    """What ``quantkit serve`` says, in one line, before it starts anything."""
    told = ended(path, *options, **env)
    assert told.count("\n") == 1
    return told


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(b"odd" * 1000)
    assert "odd.gguf: not a GGUF file" in refused(path, QUANTKIT_HOME=str(tmp_path))


def test_port_in_use(variant: Variant) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        told = refused(variant.path, "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in told
    assert "choose another with --port" in told


def test_an_open_address_demands_a_key(variant: Variant) -> None:
    assert "give --api-key" in refused(variant.path, "--host", "0.0.0.0", **NO_KEY)


def test_engine_not_installed(tmp_path: Path, tiny_llama: Path) -> None:
    told = refused(tiny_llama, "--port", str(free_port()), QUANTKIT_HOME=str(tmp_path))
    assert "vllm: not installed; run: quantkit engines install vllm" in told
