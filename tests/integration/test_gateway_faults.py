"""What a gateway does when engines, files, disks and the gateway itself fail."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.engines.llamacpp.server import find_llama_server
from quantkit.spec import Spec
from tests.integration.gateways import QUANTKIT, STREAM, Running, gateway
from tests.integration.servers import tree, wait_until_gone

PROGRAM = """#!/bin/bash
# llama-server, but for some names: one hangs, one finds its port taken when it starts first.
case " $* " in
*" --alias hangs "*) exec sleep 600 ;;
*" --alias taken "*) if [ ! -e "$0.taken" ]; then touch "$0.taken"; set -- "$@" --port {port}; fi ;;
esac
export LD_LIBRARY_PATH="{libraries}"
exec "{server}" "$@"
"""


@pytest.fixture(scope="module")
def variant(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("variants")
    return convert(Checkpoint.open(tiny_llama), Spec("gguf", "Q8_0"), None, out).path


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def program(taken_port: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    server = find_llama_server()
    path = tmp_path_factory.mktemp("program") / "llama-server"
    libraries = server.env.get("LD_LIBRARY_PATH", "")
    path.write_text(PROGRAM.format(port=taken_port, libraries=libraries, server=server.path))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def served(
    variant: Path, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Backends that fail, each in its way, beside one that does not."""
    work = tmp_path_factory.mktemp("faults")
    removed = work / "removed.gguf"
    shutil.copy(next(variant.glob("*.gguf")), removed)
    config = {
        "backends": {
            "good": {"path": str(variant), "context": 2048, "slots": 1, "queue": 1},
            **{n: {"path": str(variant), "context": 2048} for n in ("killed", "taken")},
            "removed": {"path": str(removed)},
        },
    }
    with gateway(work, config, QUANTKIT_LLAMA_SERVER=str(program)) as found:
        removed.unlink()
        yield found


def post(served: Running, model: str, **extra: Any) -> httpx.Response:
    with served.http() as http:
        body = {"model": model, "prompt": "x", "max_tokens": 2, **extra}
        return http.post("/v1/completions", json=body)


def test_engine_killed_while_it_answers(served: Running) -> None:
    """A stream ends with an error event, a whole answer is 502, the next request is answered."""
    stream = served.openai().completions.create(
        model="killed", prompt="x", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(post, served, "killed", **(STREAM | {"stream": False}))
        served.until("llamacpp:requests_processing", 2, backend="killed")
        served.engines()["killed"].kill()
        with pytest.raises(openai.APIError, match="broke off while it worked on this"):
            list(stream)
        assert whole.result().status_code == 502
        assert whole.result().json()["error"]["type"] == "engine_error"
    assert post(served, "killed").status_code == 200
    assert served.metric("quantkit_engine_restarts_total", backend="killed") == 1
    assert "exit code 137" in served.events("engine died")[0]["error"]


def test_a_broken_stream_is_well_formed(served: Running) -> None:
    post(served, "killed")
    with served.http() as http:
        body = STREAM | {"model": "killed"}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.engines()["killed"].kill()
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"engine_error"' in rest[-2]
    served.wait_for("request", 3, backend="killed", status=502)
    assert all(line.startswith("data: ") for line in rest)
    post(served, "killed")


def test_port_of_the_engine_is_taken(served: Running) -> None:
    refused = post(served, "taken")
    assert refused.status_code == 503
    time.sleep(int(refused.headers["Retry-After"]))
    assert post(served, "taken").status_code == 200


def test_model_file_is_removed(served: Running) -> None:
    refused = post(served, "removed")
    assert refused.status_code == 503
    assert "/" not in refused.json()["error"]["message"]  # no paths for clients
    failed = [e for e in served.events("engine failed") if e["backend"] == "removed"]
    assert "removed.gguf" in failed[0]["error"]
    assert post(served, "good").status_code == 200


def test_more_than_the_queue_holds(served: Running) -> None:
    """One slot and one place to wait: of four, two are refused at once and told when to return."""
    post(served, "good")
    with ThreadPoolExecutor(4) as pool:
        extra = {"max_tokens": 1000, "ignore_eos": True}
        answers = list(pool.map(lambda _: post(served, "good", **extra), range(4)))
    assert sorted(a.status_code for a in answers) == [200, 200, 429, 429]
    assert all(1 <= int(a.headers["Retry-After"]) <= 30 for a in answers if a.status_code == 429)


def test_own_port_is_taken(variant: Path, taken_port: int) -> None:
    done = subprocess.run(
        [*QUANTKIT, "serve", str(variant), "--preload", "--port", str(taken_port)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{taken_port}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def pair(variant: Path) -> dict[str, Any]:
    """Two engines of which the memory budget holds one."""
    backend = {"path": str(variant), "context": 2048, "memory": "1GiB"}
    return {
        "memory_budget": "1.5GiB",
        "idle_timeout_seconds": 1.5,
        "backends": {"a": backend, "b": backend},
    }


def test_who_is_idle_makes_room_and_is_unloaded_later(pair: dict[str, Any], tmp_path: Path) -> None:
    with gateway(tmp_path, pair) as served:
        for name in ("a", "b", "a"):
            assert post(served, name).status_code == 200
            assert set(served.engines()) == {name}
        served.wait_for("engine unloaded", backend="a", why="idle")
        wait_until_gone(list(served.engines().values()))
        assert served.metric("quantkit_engine_up") == 0
        assert post(served, "a").status_code == 200


def test_an_engine_in_use_is_never_unloaded(pair: dict[str, Any], tmp_path: Path) -> None:
    """b waits for the stream of a, and then gets its turn before the next one of a."""
    with gateway(tmp_path, pair | {"limits": {"room_seconds": 20}}) as served:
        post(served, "a")
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(post, served, "a", **STREAM)
            served.until("quantkit_requests_running", 1, backend="a")
            other = pool.submit(post, served, "b")
            served.until("quantkit_requests_queued", 1, backend="b")
            second = pool.submit(post, served, "a")
            assert '"predicted_n":1900' in first.result().text
            assert other.result().status_code == 200
            assert second.result().status_code == 200
        order = [e["backend"] for e in served.events("request") if e["method"] == "POST"]
        assert order == ["a", "a", "b", "a"]


def test_no_room_in_time(pair: dict[str, Any], tmp_path: Path) -> None:
    limits = {"limits": {"room_seconds": 0.2}}
    with gateway(tmp_path, pair | limits) as served, ThreadPoolExecutor(1) as pool:
        post(served, "a")
        first = pool.submit(post, served, "a", **STREAM)
        served.until("quantkit_requests_running", 1, backend="a")
        refused = post(served, "b")
        assert refused.status_code == 503
        assert "no memory for its engine now" in refused.json()["error"]["message"]
        assert "Retry-After" in refused.headers
        assert '"predicted_n":1900' in first.result().text


@contextlib.contextmanager
def streaming(served: Running, model: str) -> Iterator[list[str]]:
    """The lines of a stream, which is read beside; complete when the block has ended."""
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with served.http() as http:
            body = STREAM | {"model": model}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    begun.set()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(read)
        assert begun.wait(30)
        yield lines
        done.result(60)


@pytest.mark.parametrize(("seconds", "whole"), [(30, True), (0.3, False)])
def test_drains_when_asked_to_end(
    variant: Path, tmp_path: Path, seconds: float, whole: bool
) -> None:
    config = {
        "backends": {"a": {"path": str(variant), "context": 2048}},
        "limits": {"drain_seconds": seconds},
    }
    with gateway(tmp_path, config) as served:
        family = tree(served.process.pid)
        with streaming(served, "a") as lines:
            family = tree(served.process.pid)
            served.process.send_signal(signal.SIGTERM)
            served.wait_for("draining")
            with pytest.raises(httpx.ConnectError):
                post(served, "a")
        assert lines[-2] == "data: [DONE]"
        assert ('"predicted_n":1900' in lines[-4]) == whole
        assert ("the server is stopping" in lines[-4]) != whole
        assert served.process.wait(30) == 0
        wait_until_gone(family)


def test_nothing_is_left_when_the_gateway_is_killed(variant: Path, tmp_path: Path) -> None:
    with gateway(tmp_path, None, str(variant), "--preload") as served:
        served.wait_for("engine ready")
        family = tree(served.process.pid)
        assert len(family) >= 3
        served.process.kill()
        wait_until_gone(family)


def test_engine_that_never_gets_ready(variant: Path, program: Path, tmp_path: Path) -> None:
    """Who waits for it is told in time, others are served, and it does not outlive the gateway."""
    config = {
        "backends": {
            "hangs": {"path": str(variant), "preload": True},
            "good": {"path": str(variant), "preload": True},
        },
        "limits": {"deadline_seconds": 3},
    }
    with gateway(tmp_path, config, QUANTKIT_LLAMA_SERVER=str(program)) as served:
        served.wait_for("engine ready", backend="good")
        with served.http() as http:
            assert http.get("/health/ready").status_code == 503
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, served, "hangs")
            assert post(served, "good").status_code == 200
            assert waiting.result().status_code == 504
        assert "not done after 3 s" in waiting.result().json()["error"]["message"]
        family = tree(served.process.pid)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
        wait_until_gone(family)


def test_disk_full_for_logs(variant: Path, tmp_path: Path) -> None:
    """Neither the gateway's own lines nor the engine's can be written; both go on."""
    config = {"backends": {"a": {"path": str(variant)}}}
    with Path("/dev/full").open("wb") as full, gateway(tmp_path, config, stderr=full) as served:
        logs = tmp_path / "home" / "logs" / f"serve-{served.port}"
        (logs / "a.log").symlink_to("/dev/full")
        assert [post(served, "a").status_code for _ in range(3)] == [200] * 3
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
