"""Bad requests by the thousand beside good streams: nobody who behaves notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.integration.gateways import KEY, Running, gateway
from tests.integration.servers import PATIENCE

BODY_LIMIT = 64 << 10
CLIENT_SECONDS = 5
GOOD, BAD = 8, 1000
MORE_MEMORY = BAD * (64 << 10) + (32 << 20)
"""Bytes that the gateway may take for them: what it reads of each at a time, and some."""


@pytest.fixture(scope="module")
def served(
    patient_llama: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    path = str(patient_llama["Q8_0"])
    config = {
        "backends": {"m": {"path": path, "context": 2048, "slots": GOOD, "preload": True}},
        "limits": {
            "body": BODY_LIMIT,
            "bodies": 64 * BODY_LIMIT,
            "client_seconds": CLIENT_SECONDS,
            "connections": 2 * BAD,
        },
    }
    with gateway(tmp_path_factory.mktemp("abuse"), config) as found:
        found.wait_for("engine ready")
        yield found


def head(length: str = "", key: str = KEY, type_: str = "application/json") -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: {type_}\r\n{length}\r\n"
    ).encode()


def sized(body: bytes, **options: str) -> bytes:
    return head(f"Content-Length: {len(body)}\r\n", **options) + body


CHUNK = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
REQUEST = json.dumps({"model": "m", "prompt": "x", "max_tokens": 1}).encode()
BAD_REQUESTS: dict[str, tuple[bytes, int | None]] = {
    "not HTTP": (b"\x16\x03\x01 garbage \xff\r\n\r\n", 400),
    "not JSON": (sized(b"{" * 1000), 400),
    "nested": (sized(b"[" * 60_000), 400),
    "digits": (sized(b'{"model": ' + b"9" * 50_000 + b"}"), 400),
    "a list": (sized(b"[1, 2]"), 400),
    "no model": (sized(b"{}"), 400),
    "unknown model": (sized(b'{"model": "x", "prompt": "x"}'), 404),
    "wrong key": (sized(REQUEST, key="wrong"), 401),
    "wrong key, huge": (head("Content-Length: 99999999999\r\n", key="wrong"), 401),
    "wrong type": (sized(REQUEST, type_="text/plain"), 415),
    "huge": (head("Content-Length: 99999999999\r\n") + CHUNK, 413),
    "huge in chunks": (head("Transfer-Encoding: chunked\r\n") + CHUNK * 20, 413),
    "broken chunks": (head("Transfer-Encoding: chunked\r\n") + b"zz\r\n", 400),
    "long head": (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, 400),
    "silent": (b"", None),
    "half a head": (b"POST /v1/completions HTTP/1.1\r\nHost: ", None),
    "half a body": (head("Content-Length: 1000\r\n") + b'{"model"', 408),
}
"""What is sent, and the status that must come; None: the connection is closed."""


DRIPS: dict[str, tuple[bytes, bytes, int | None]] = {
    "slow head": (b"GET /v1/models HTTP/1.1\r\n", b"X: y\r\n", None),
    "slow body": (head(f"Content-Length: {BODY_LIMIT}\r\n"), b" ", 408),
}
"""What is sent first, and then again and again; and the same."""


async def status_of(reader: asyncio.StreamReader) -> int | None:
    """Of the answer; None where the connection is closed without one."""
    line = b""
    with contextlib.suppress(ConnectionError):
        line = await asyncio.wait_for(reader.readline(), PATIENCE)
    return int(line.split()[1]) if line else None


async def send(port: int, data: bytes) -> int | None:
    """The status that comes back for ``data``."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        return await status_of(reader)
    finally:
        writer.close()


async def drip(port: int, first: bytes, then: bytes) -> int | None:
    """The status that comes back for what would go on for ever."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def go_on() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(then)
                await writer.drain()
                await asyncio.sleep(0.1)

    writer.write(first)
    dripping = asyncio.create_task(go_on())
    try:
        return await status_of(reader)
    finally:
        dripping.cancel()
        writer.close()


async def attack(port: int) -> Counter[tuple[str, int | None]]:
    """So many bad requests at once, and what became of each."""
    kinds: dict[str, Callable[[], Coroutine[None, None, int | None]]] = {
        **{name: lambda d=data: send(port, d) for name, (data, _) in BAD_REQUESTS.items()},  # type: ignore[misc]
        **{name: lambda f=f, t=t: drip(port, f, t) for name, (f, t, _) in DRIPS.items()},  # type: ignore[misc]
    }
    names = [list(kinds)[number % len(kinds)] for number in range(BAD)]
    statuses = await asyncio.gather(*(kinds[name]() for name in names))
    return Counter(zip(names, statuses, strict=True))


def good_stream(served: Running) -> str:
    body = {"model": "m", "prompt": "the list", "max_tokens": 500, "stream": True}
    with served.http() as http:
        return http.post("/v1/completions", json=body | {"ignore_eos": True}).text


def good_streams(served: Running, over: threading.Event) -> list[str]:
    """One after the other as long as the attack lasts."""
    texts = []
    while not over.is_set():
        texts.append(good_stream(served))
    return texts


def largest(process: psutil.Process, over: threading.Event) -> int:
    """The most resident memory that a process was seen with."""
    found = 0
    while not over.wait(0.05):
        found = max(found, process.memory_info().rss)
    return found


def test_good_streams_among_bad_requests(served: Running) -> None:
    process = psutil.Process(served.process.pid)
    good_stream(served)
    before = process.memory_info().rss
    over = threading.Event()
    with ThreadPoolExecutor(GOOD + 1) as pool:
        streams = [pool.submit(good_streams, served, over) for _ in range(GOOD)]
        peak = pool.submit(largest, process, over)
        try:
            results = asyncio.run(attack(served.port))
        finally:
            over.set()
    expected = {(name, status) for name, (*_, status) in (BAD_REQUESTS | DRIPS).items()}
    # Too many bodies at once, or more than the machine reads in time.
    crowded = {(name, status) for name in BAD_REQUESTS | DRIPS for status in (429, 408, None)}
    assert expected <= set(results) <= expected | crowded
    assert sum(results.values()) == BAD
    for stream in streams:
        assert stream.result()
        for text in stream.result():
            assert '"predicted_n":500' in text
            assert text.endswith("data: [DONE]\n\n")
            assert '"error"' not in text
    assert peak.result() - before < MORE_MEMORY
    assert good_stream(served).endswith("data: [DONE]\n\n")
    assert served.events("fault") == []


def test_more_connections_than_allowed(tmp_path: Path) -> None:
    """Those beyond the limit are turned away; when the others leave there is room again."""
    config = {
        "backends": {"m": {"url": "http://127.0.0.1:9/v1"}},
        "limits": {"connections": 16, "client_seconds": PATIENCE},
    }
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"

    async def crowd(port: int) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(16)]
        try:
            refused = [await send(port, request) for _ in range(5)]
        finally:
            for _, writer in idle:
                writer.close()
        assert set(refused) <= {503, None}
        while await send(port, request) != 200:
            await asyncio.sleep(0.02)

    with gateway(tmp_path, config) as served:
        asyncio.run(asyncio.wait_for(crowd(served.port), PATIENCE))
