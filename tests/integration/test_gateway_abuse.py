"""Bad requests by the hundred beside good streams: nobody who behaves notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.spec import Spec
from tests.integration.gateways import KEY, STREAM, Running, gateway

BODY_LIMIT = 64 << 10
CLIENT_SECONDS = 3
GOOD, BAD = 8, 400


@pytest.fixture(scope="module")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    work = tmp_path_factory.mktemp("abuse")
    path = convert(Checkpoint.open(tiny_llama), Spec("gguf", "Q8_0"), None, work).path
    config = {
        "backends": {"m": {"path": str(path), "context": 2048, "slots": GOOD, "preload": True}},
        "limits": {
            "body": BODY_LIMIT,
            "bodies": 8 * BODY_LIMIT,
            "client_seconds": CLIENT_SECONDS,
            "connections": 2000,
        },
    }
    with gateway(work, config) as found:
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


async def send(port: int, data: bytes) -> int | None:
    """The status of the answer, None where the connection is closed without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        line = b""
        with contextlib.suppress(ConnectionError):
            line = await asyncio.wait_for(reader.readline(), 60)
        return int(line.split()[1]) if line else None
    finally:
        writer.close()


async def drip(port: int) -> int | None:
    """A head that arrives byte by byte and never ends."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /v1/models HTTP/1.1\r\n")
        for _ in range(10 * CLIENT_SECONDS * 10):
            writer.write(b"X: y\r\n")
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(0.1):
                    if not await reader.read(1):
                        return None
            if writer.is_closing():
                return None
        return -1
    finally:
        writer.close()


def good_stream(served: Running) -> str:
    with served.http() as http:
        return http.post("/v1/completions", json=STREAM | {"model": "m"}).text


def test_good_streams_among_bad_requests(served: Running) -> None:
    process = psutil.Process(served.process.pid)
    before = process.memory_info().rss
    peak = 0

    async def attack() -> Counter[tuple[str, int | None]]:
        names = [list(BAD_REQUESTS)[number % len(BAD_REQUESTS)] for number in range(BAD)]
        asked: list[Callable[[], Awaitable[int | None]]] = [
            lambda data=BAD_REQUESTS[name][0]: send(served.port, data)  # type: ignore[misc]
            for name in names
        ]
        results = await asyncio.gather(*(one() for one in asked), drip(served.port))
        return Counter(zip([*names, "drip"], results, strict=True))

    with ThreadPoolExecutor(GOOD) as pool:
        streams = [pool.submit(good_stream, served) for _ in range(GOOD)]
        served_well = asyncio.run(attack())
        peak = process.memory_info().rss
        texts = [stream.result() for stream in streams]
    expected = {(name, status) for name, (_, status) in BAD_REQUESTS.items()} | {("drip", None)}
    crowded = {(name, 429) for name in BAD_REQUESTS}  # too many bodies at once
    assert set(served_well) - crowded == expected
    assert sum(served_well.values()) == BAD + 1
    for text in texts:
        assert '"predicted_n":1900' in text
        assert text.endswith("data: [DONE]\n\n")
        assert '"error"' not in text
    assert peak - before < 64 << 20
    assert good_stream(served).endswith("data: [DONE]\n\n")
    assert served.events("fault") == []


def test_more_connections_than_allowed(served: Running) -> None:
    """Those beyond the limit are turned away; when the others leave there is room again."""

    async def crowd() -> Counter[int | None]:
        idle = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(2000)]
        try:
            request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
            return Counter([await send(served.port, request) for _ in range(5)])
        finally:
            for _, writer in idle:
                writer.close()

    assert set(asyncio.run(crowd())) <= {503, None}
    assert good_stream(served).endswith("data: [DONE]\n\n")
