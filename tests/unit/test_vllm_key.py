from __future__ import annotations

import asyncio
from typing import Any

import pytest

from quantkit.engines.vllm.demand_key import DemandKey


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> DemandKey:
    """Before a server that answers 200 to everything."""
    monkeypatch.setenv("VLLM_API_KEY", "right")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return DemandKey(app)


def status(guarded: DemandKey, path: str, key: bytes | None, kind: str = "http") -> Any:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read of a request that is refused")

    headers = [] if key is None else [(b"authorization", key)]
    asyncio.run(guarded({"type": kind, "path": path, "headers": headers}, receive, send))
    return sent[0].get("status", sent[0]["type"])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b"Bearer right", 200),
        (b"bearer  right", 200),
        (None, 401),
        (b"", 401),
        (b"right", 401),
        (b"Bearer", 401),
        (b"Bearer righ", 401),
        (b"Bearer rightt", 401),
        (b"Basic right", 401),
        (b"Bearer \xff", 401),
    ],
)
def test_only_the_key_opens(guarded: DemandKey, key: bytes | None, expected: int) -> None:
    for path in ("/v1/completions", "/invocations", "/health/", "//health", "/"):
        assert status(guarded, path, key) == expected
    assert status(guarded, "/health", key) == 200


def test_websockets_are_closed(guarded: DemandKey) -> None:
    assert status(guarded, "/v1/realtime", None, "websocket") == "websocket.close"
