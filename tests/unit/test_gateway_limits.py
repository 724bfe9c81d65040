from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit.gateway.answers import ApiError
from quantkit.gateway.config import Limits
from quantkit.gateway.limits import Bodies, Key


def asking(authorization: str) -> Any:
    return SimpleNamespace(headers={"Authorization": authorization})


def test_a_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is sent, one comparison of equally many bytes that does not stop early."""
    compared: list[tuple[int, int]] = []

    def watched(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", watched)
    key = Key("right")
    sent = ["", "Bearer", "Bearer r", "Bearer righ", "Bearer righT", "Basic right", "x" * 10_000,
            "Bearer \udcff"]  # fmt: skip
    for authorization in sent:
        with pytest.raises(ApiError, match="expected `Authorization"):
            key.check(asking(authorization))
    key.check(asking("Bearer right"))
    key.check(asking("bearer  right"))
    assert compared == [(32, 32)] * (len(sent) + 2)


class Sender:
    """A request whose body comes in parts, and then stands still."""

    def __init__(self, *parts: bytes, length: int | None = None, ends: bool = True) -> None:
        self.content_length = length
        self.content = self
        self._parts, self._ends = parts, ends

    async def iter_any(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part
        if not self._ends:
            await asyncio.Event().wait()


async def status(bodies: Bodies, request: Any) -> int:
    try:
        async with bodies.read(request) as body:
            assert body == b"".join(request._parts)
            return 200
    except ApiError as error:
        return error.status


def test_what_has_arrived_counts_and_is_given_back() -> None:
    limits = Limits(body=100, bodies=250, client_seconds=0.2)

    async def scenario() -> None:
        bodies = Bodies(limits)
        slow = [
            asyncio.create_task(status(bodies, Sender(b"x", length=100, ends=False)))
            for _ in range(50)
        ]
        await asyncio.sleep(0)  # each has sent a byte of the hundred that it announced
        assert await status(bodies, Sender(b"a" * 100)) == 200
        assert await status(bodies, Sender(b"a" * 50, b"b" * 51)) == 413
        assert await status(bodies, Sender(length=101)) == 413
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(bodies.read(Sender(b"a" * 100)))  # type: ignore[arg-type]
            assert await status(bodies, Sender(b"b" * 50, b"b")) == 429
        assert await asyncio.gather(*slow) == [408] * 50
        assert bodies._held == 0

    asyncio.run(scenario())
