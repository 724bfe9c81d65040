"""One request, sent to one backend, and its answer, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from quantkit.gateway import unreadable
from quantkit.gateway.answers import ApiError, Unreachable
from quantkit.gateway.backends import Serving, Upstream
from quantkit.gateway.body import Body
from quantkit.gateway.choices import STREAMED, SummedEvents, assembled
from quantkit.gateway.metrics import Meters
from quantkit.gateway.stream import Events, usage

REQUEST_ID = "X-Request-Id"
_SECONDS_TO_CONNECT = 10.0
_PASSED_BACK = ("Content-Type", "Retry-After")
_REFUSED_KEY = (401, 403)
_STREAM_FAILED = "the engine ended the stream with an error"


@dataclass
class Exchange:
    """A client's request on its way, and what the log will say about it."""

    request: web.BaseRequest
    id: str
    began: float = field(default_factory=time.monotonic)
    model: str | None = None
    backend: Serving | None = None
    status: int = 0
    """The status of the answer, or of the error with which a stream ends."""
    ttft: float | None = None
    tokens: tuple[int, int] | None = None
    stream: web.StreamResponse | None = None
    """The answer, once it has begun as a stream."""
    error: str | None = None


def new_session() -> aiohttp.ClientSession:
    """To the backends. A connection is used once: llama-server drops one that is kept alive after
    a stream now and then, and a request that was lost so could not safely be sent again."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_SECONDS_TO_CONNECT),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
        auto_decompress=False,
        read_bufsize=1 << 18,
    )


async def forward(
    session: aiohttp.ClientSession,
    exchange: Exchange,
    upstream: Upstream,
    body: Body,
    meters: Meters,
    client_seconds: float,
) -> web.StreamResponse:
    """The backend's answer; 400 instead of the 500 of one that cannot read the request. However
    this ends, the connection is closed, which makes an engine stop to compute what nobody waits
    for.

    Raise Unreachable where the backend cannot be reached, ApiError 502 where it breaks off
    before an answer has begun; after that the stream ends with an error event.
    """
    backend = exchange.backend
    assert backend is not None
    path = exchange.request.path
    gathered = not backend.sums_choices and body.answers > 1 and body.streamable
    sent = body.naming(upstream.model, **(STREAMED if gathered else {}))
    headers = {"Content-Type": "application/json", REQUEST_ID: exchange.id}
    if upstream.key is not None:
        headers["Authorization"] = f"Bearer {upstream.key}"
    try:
        async with session.post(
            upstream.url + path,
            data=sent,
            headers=headers,
            allow_redirects=False,
        ) as answer:
            if answer.status in _REFUSED_KEY:
                raise ApiError(502, f"{backend.name}: does not accept the key it is given")
            if answer.content_type == "text/event-stream":
                events = _events(exchange.began, meters, body)
                if gathered:
                    return await _gathered(exchange, answer, events)
                return await _stream(exchange, answer, events, client_seconds)
            content = await answer.read()
            if answer.status == 500:
                reason = await unreadable.reason(session, upstream, path, sent, headers, content)
                if reason is not None:
                    # The client's own words may be in it, and are not for the log.
                    exchange.error = "the engine cannot read the request"
                    return ApiError(400, reason).response()
            return _whole(exchange, answer, content)
    except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as error:
        raise Unreachable(502, f"{backend.name}: cannot be reached") from error
    except (aiohttp.ClientError, ConnectionError) as error:
        raise ApiError(
            502, f"{backend.name}: its engine broke off while it worked on this"
        ) from error


def _whole(exchange: Exchange, answer: aiohttp.ClientResponse, content: bytes) -> web.Response:
    if answer.status == 200 and b'"usage"' in content:
        exchange.tokens = usage(json.loads(content))
    headers = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
    return web.Response(body=content, status=answer.status, headers=headers)


def _events(began: float, meters: Meters, body: Body) -> Events:
    if body.answers == 1:
        return Events(began, meters)
    return SummedEvents(began, meters, body.choices, body.prompts)


async def _gathered(
    exchange: Exchange, answer: aiohttp.ClientResponse, events: Events
) -> web.Response:
    """The whole answer out of a stream."""
    stream = b"".join(
        [events.feed(data, time.monotonic()) async for data in answer.content.iter_any()]
    )
    if not events.ended:
        raise aiohttp.ClientPayloadError("no end")
    content = assembled(stream)
    if error := content.get("error"):
        exchange.error = _STREAM_FAILED
        return web.json_response(content, status=error["code"])
    exchange.tokens = events.usage()
    return web.json_response(content)


async def _stream(
    exchange: Exchange, answer: aiohttp.ClientResponse, events: Events, client_seconds: float
) -> web.StreamResponse:
    stream = web.StreamResponse(
        status=answer.status,
        headers={
            "Content-Type": answer.headers["Content-Type"],
            "Cache-Control": "no-cache",
            REQUEST_ID: exchange.id,
        },
    )
    try:
        await stream.prepare(exchange.request)
    except ConnectionError as error:
        raise ClientGone from error
    exchange.stream = stream
    try:
        async for data in answer.content.iter_any():
            if whole := events.feed(data, time.monotonic()):
                await send(stream, whole, client_seconds)
        if not events.ended:
            raise aiohttp.ClientPayloadError("no end")
        if events.failed:
            exchange.status, exchange.error = 502, _STREAM_FAILED
    finally:
        exchange.ttft = events.first
        exchange.tokens = events.usage()
    await stream.write_eof()
    return stream


async def send(stream: web.StreamResponse, data: bytes, seconds: float) -> None:
    """Raise ClientGone where the client does not take it in time."""
    try:
        async with asyncio.timeout(seconds):
            await stream.write(data)
    except (TimeoutError, ConnectionError) as error:
        raise ClientGone from error


class ClientGone(Exception):
    """It has closed the connection, or does not read."""
