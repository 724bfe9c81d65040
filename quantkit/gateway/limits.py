"""Bounds that hold before a request is looked at: connections, bodies, keys."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import resource
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from quantkit.gateway.address import is_loopback
from quantkit.gateway.answers import ApiError
from quantkit.gateway.config import Limits

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)
_SPARE_FILES = 256
"""Open files beside the clients' connections."""


class Key:
    """The key that clients must send, compared in a time that does not depend on what they sent."""

    def __init__(self, key: str | None) -> None:
        self._digest = hashlib.sha256(key.encode()).digest() if key is not None else None

    def check(self, request: web.BaseRequest) -> None:
        """Raise ApiError 401 for another key or none, 403 for a page that speaks to loopback."""
        if self._digest is None:
            _check_host(request)
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        sent = hashlib.sha256(given.strip().encode(errors="surrogateescape")).digest()
        if not hmac.compare_digest(sent, self._digest) or scheme.lower() != "bearer":
            raise ApiError(401, "expected `Authorization: Bearer KEY` with this server's key")


def _check_host(request: web.BaseRequest) -> None:
    """Without a key, a name that a web page has made to point here must not open the door."""
    try:
        host = request.url.host or ""
    except ValueError:
        host = ""
    if not is_loopback(host):
        raise ApiError(403, "without a key this server answers to localhost only; give it one")


class Bodies:
    """Reads the bodies of requests; the bytes held at the same time are limited.

    What has arrived counts, not what was announced: a client that sends nothing takes no room from
    others.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: web.BaseRequest) -> AsyncIterator[bytes]:
        """The body; what it takes is given back when the block ends.

        Raise ApiError: 413 too large, 429 too much at once, 408 too slow, 400 broken off.
        """
        limit, length = self._limits.body, request.content_length
        if length is not None and length > limit:
            raise ApiError(413, f"the body has {length} bytes; the limit is {limit}")
        body = await self._receive(request)
        try:
            yield body
        finally:
            self._held -= len(body)

    async def _receive(self, request: web.BaseRequest) -> bytes:
        """The body, which counts from now on; nothing of it does where this raises."""
        received = bytearray()
        try:
            async with asyncio.timeout(self._limits.client_seconds):
                async for part in request.content.iter_any():
                    if len(received) + len(part) > self._limits.body:
                        raise ApiError(413, f"the body exceeds {self._limits.body} bytes")
                    if self._held + len(part) > self._limits.bodies:
                        raise ApiError(429, "too many large requests at once", retry_after=1)
                    received += part
                    self._held += len(part)
            return bytes(received)
        except BaseException as error:
            self._held -= len(received)
            if isinstance(error, TimeoutError):
                raise ApiError(408, "the body did not arrive in time") from error
            if isinstance(error, web.RequestPayloadError | ValueError):
                raise ApiError(400, "the body is broken") from error
            raise


class _Refusal(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(_FULL)
        transport.close()


def at_most(server: web.Server, connections: int) -> Callable[[], asyncio.Protocol]:
    """What makes the protocol of a new connection: one that refuses where there are too many."""

    def made() -> asyncio.Protocol:
        return _Refusal() if len(server.connections) >= connections else server()

    return made


def allow_connections(wanted: int) -> int:
    """Raise this process's limit of connections to clients and engines; the limit it gets."""
    needed = 2 * wanted + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        soft = needed
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (soft - _SPARE_FILES) // 2))
