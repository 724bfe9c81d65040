"""What a gateway does when engines, files, disks and the gateway itself fail."""

from __future__ import annotations

import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.integration.faulty import STARVED, llama_server
from tests.integration.gateways import CONTEXT, ENDLESS, LENGTH, Running, gateway
from tests.integration.servers import PATIENCE, tree, wait_until_gone


@pytest.fixture(scope="module")
def variant(patient_llama: dict[str, Path]) -> Path:
    return patient_llama["Q8_0"]


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def program(taken_port: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_server(tmp_path_factory.mktemp("program"), taken_port)


@pytest.fixture(scope="module")
def served(
    variant: Path, program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Backends that fail, each in its way, beside one that does not."""
    work = tmp_path_factory.mktemp("faults")
    removed = work / "removed.gguf"
    shutil.copy(next(variant.glob("*.gguf")), removed)
    one = {"path": str(variant), "context": CONTEXT, "slots": 1}
    config = {
        "backends": {
            "good": one | {"queue": 1},
            "killed": one | {"slots": 2},
            "taken": one,
            "starved": one | STARVED,
            "removed": {"path": str(removed)},
        },
        "limits": {"client_seconds": PATIENCE},
    }
    with gateway(work, config, QUANTKIT_LLAMA_SERVER=str(program)) as found:
        removed.unlink()
        yield found


def test_engine_killed_while_it_answers(served: Running) -> None:
    """A stream ends with an error event, a whole answer is 502, the next request is answered."""
    restarts = served.metric("quantkit_engine_restarts_total", backend="killed")
    stream = served.openai().completions.create(
        model="killed", prompt="x", max_tokens=LENGTH, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(served.post, "killed", **ENDLESS)
        served.until("llamacpp:requests_processing", 2, backend="killed")
        served.engines()["killed"].kill()
        with pytest.raises(openai.APIError, match="broke off while it worked on this"):
            list(stream)
        assert whole.result().status_code == 502
        assert whole.result().json()["error"]["type"] == "engine_error"
    assert served.post("killed").status_code == 200
    assert served.metric("quantkit_engine_restarts_total", backend="killed") == restarts + 1
    died = [e["error"] for e in served.events("engine died") if e["backend"] == "killed"]
    assert "exit code 137" in died[-1]


def test_a_broken_stream_is_well_formed(served: Running) -> None:
    with served.streaming("killed") as stream:
        served.engines()["killed"].kill()
        lines = stream.rest()
    assert len(lines) < LENGTH
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert '"engine_error"' in lines[-2]
    assert served.wait_for("request", id=stream.id)["status"] == 502
    assert served.post("killed").status_code == 200


def test_port_of_the_engine_is_taken(served: Running) -> None:
    refused = served.post("taken")
    assert refused.status_code == 503
    time.sleep(int(refused.headers["Retry-After"]))
    assert served.post("taken").status_code == 200


def test_engine_out_of_memory(served: Running) -> None:
    """Its cache cannot be allocated: told in one line, others are served, later it is as well."""
    refused = served.post("starved")
    assert refused.status_code == 503
    failed = [e["error"] for e in served.events("engine failed") if e["backend"] == "starved"]
    assert "alloc" in failed[0]
    assert served.post("good").status_code == 200
    time.sleep(int(refused.headers["Retry-After"]))
    assert served.post("starved").status_code == 200


def test_model_file_is_removed(served: Running) -> None:
    refused = served.post("removed")
    assert refused.status_code == 503
    assert "/" not in refused.json()["error"]["message"]  # no paths for clients
    failed = [e for e in served.events("engine failed") if e["backend"] == "removed"]
    assert "removed.gguf" in failed[0]["error"]
    assert served.post("good").status_code == 200


def test_more_than_the_queue_holds(served: Running) -> None:
    """One slot and one place to wait: the third is refused at once and told when to return."""
    with ThreadPoolExecutor(1) as pool:
        with served.streaming("good") as stream:
            waiting = pool.submit(served.post, "good")
            served.until("quantkit_requests_queued", 1, backend="good")
            refused = served.post("good")
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["Retry-After"]) <= 30
            stream.until_more()  # and nobody was disturbed
        assert waiting.result().status_code == 200
    assert served.post("good").status_code == 200


@pytest.mark.parametrize(("seconds", "whole"), [(30, True), (0.3, False)])
def test_drains_when_asked_to_end(
    variant: Path, tmp_path: Path, seconds: float, whole: bool
) -> None:
    """What is not over in time ends with an error; the engine stands still until it is asked to."""
    config = {
        "backends": {"a": {"path": str(variant), "context": CONTEXT, "slots": 1, "preload": True}},
        "limits": {"drain_seconds": seconds},
    }
    with gateway(tmp_path, config) as served:
        served.wait_for("engine ready")
        engine = served.engines()["a"]
        family = tree(served.process.pid)
        with served.streaming("a", max_tokens=1000 if whole else LENGTH) as stream:
            engine.suspend()
            served.process.send_signal(signal.SIGTERM)
            served.wait_for("draining")
            with pytest.raises(httpx.ConnectError):
                served.post("a")
            engine.resume()
            lines = stream.rest()
        assert lines[-1] == "data: [DONE]"
        assert ('"predicted_n":1000' in lines[-2]) == whole
        assert ("the server is stopping" in lines[-2]) != whole
        assert served.process.wait(PATIENCE) == 0
        wait_until_gone(family)


def test_nothing_is_left_when_the_gateway_is_killed(variant: Path, tmp_path: Path) -> None:
    with gateway(tmp_path, None, str(variant)) as served:
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
            waiting = pool.submit(served.post, "hangs")
            assert served.post("good").status_code == 200
            assert waiting.result().status_code == 504
        assert "not done after 3 s" in waiting.result().json()["error"]["message"]
        family = tree(served.process.pid)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(PATIENCE) == 0
        wait_until_gone(family)


def test_disk_full_for_logs(variant: Path, tmp_path: Path) -> None:
    """Neither the gateway's own lines nor the engine's can be written; both go on."""
    config = {"backends": {"a": {"path": str(variant)}}}
    with Path("/dev/full").open("wb") as full, gateway(tmp_path, config, stderr=full) as served:
        logs = tmp_path / "home" / "logs" / f"serve-{served.port}"
        (logs / "a.log").symlink_to("/dev/full")
        assert [served.post("a").status_code for _ in range(3)] == [200] * 3
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(PATIENCE) == 0
