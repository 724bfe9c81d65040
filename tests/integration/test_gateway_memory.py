"""Engines that share a memory budget: who makes room, who waits, who is unloaded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.gateways import CONTEXT, gateway
from tests.integration.servers import PATIENCE, wait_until_gone


@pytest.fixture(scope="module")
def pair(patient_llama: dict[str, Path]) -> dict[str, Any]:
    """Two engines of which the memory budget holds one."""
    one = {"path": str(patient_llama["Q8_0"]), "context": CONTEXT, "slots": 1, "memory": "1GiB"}
    return {
        "memory_budget": "1.5GiB",
        "backends": {"a": one, "b": one},
        "limits": {"room_seconds": PATIENCE},
    }


def test_who_is_idle_makes_room(pair: dict[str, Any], tmp_path: Path) -> None:
    with gateway(tmp_path, pair) as served:
        for name in ("a", "b", "a"):
            assert served.post(name).status_code == 200
            assert set(served.engines()) == {name}


def test_who_is_unused_is_unloaded(pair: dict[str, Any], tmp_path: Path) -> None:
    with gateway(tmp_path, pair | {"idle_timeout_seconds": 0.5}) as served:
        assert served.post("a").status_code == 200
        served.wait_for("engine unloaded", backend="a", why="idle")
        wait_until_gone(list(served.engines().values()))
        assert served.metric("quantkit_engine_up") == 0
        assert served.post("a").status_code == 200


def test_an_engine_in_use_is_never_unloaded(pair: dict[str, Any], tmp_path: Path) -> None:
    """b waits for the stream of a, and then gets its turn before the next one of a."""
    with gateway(tmp_path, pair) as served, ThreadPoolExecutor(2) as pool:
        with served.streaming("a") as stream:
            other = pool.submit(served.post, "b")
            served.until("quantkit_requests_queued", 1, backend="b")
            second = pool.submit(served.post, "a")
            served.until("quantkit_requests_queued", 1, backend="a")
            stream.until_more()
            assert set(served.engines()) == {"a"}
        assert other.result().status_code == 200
        assert second.result().status_code == 200
        requests = [e for e in served.events("request") if e["method"] == "POST"]
        assert [(e["backend"], e["status"]) for e in requests] == [
            ("a", 499), ("b", 200), ("a", 200),
        ]  # fmt: skip


def test_no_room_in_time(pair: dict[str, Any], tmp_path: Path) -> None:
    hurried = pair | {"limits": {"room_seconds": 0.2}}
    with gateway(tmp_path, hurried) as served, served.streaming("a") as stream:
        refused = served.post("b")
        assert refused.status_code == 503
        assert "no memory for its engine now" in refused.json()["error"]["message"]
        assert "Retry-After" in refused.headers
        stream.until_more()
