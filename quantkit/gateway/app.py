"""The routes of a gateway. What is not listed here does not exist."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import web

from quantkit.gateway import access_log
from quantkit.gateway.answers import ApiError, NotTaken, Unreachable
from quantkit.gateway.body import Body
from quantkit.gateway.config import GatewayConfig
from quantkit.gateway.limits import Bodies, Key
from quantkit.gateway.metrics import CONTENT_TYPE, Metrics
from quantkit.gateway.pool import Pool
from quantkit.gateway.proxy import REQUEST_ID, ClientGone, Exchange, forward, send
from quantkit.gateway.routing import Router

_SHORT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CLIENT_GONE = 499
"""The status in log and metrics of a request whose client has gone."""
_LONGEST_PATH = 100
_MODELS = "/v1/models"
_CHAT = "/v1/chat/completions"
_PASSED = (_CHAT, "/v1/completions", "/tokenize")

Handler = Callable[[Exchange], Awaitable[web.StreamResponse]]


class Gateway:
    """Answers requests. ``draining`` refuses new ones; ``abandon`` ends those that still run."""

    def __init__(
        self, config: GatewayConfig, key: str | None, pool: Pool, session: aiohttp.ClientSession
    ) -> None:
        self.draining = False
        self.running: set[asyncio.Task[object]] = set()
        """Requests for a model that have no complete answer yet."""
        self._limits = config.limits
        self._pool = pool
        self._session = session
        self._router = Router(config, pool.backends)
        self._metrics = Metrics(pool)
        self._bodies = Bodies(config.limits)
        self._key = Key(key)
        self._started = int(time.time())
        self._abandoned = False
        self._open: dict[tuple[str, str], Handler] = {
            ("GET", "/health"): self._health,
            ("GET", "/health/live"): self._live,
            ("GET", "/health/ready"): self._health,
        }
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", "/metrics"): self._measured,
            ("GET", _MODELS): self._models,
            **{("POST", path): self._passed for path in _PASSED},
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Any request; its line is in the log when this returns."""
        given = request.headers.get(REQUEST_ID, "")
        exchange = Exchange(request, given if _SHORT_ID.fullmatch(given) else secrets.token_hex(16))
        try:
            response = await self._answer(exchange)
            exchange.status = exchange.status or response.status
            if response is not exchange.stream:
                response.headers[REQUEST_ID] = exchange.id
            return response
        except (asyncio.CancelledError, ClientGone):
            exchange.status = _CLIENT_GONE
            if request.transport is not None:
                request.transport.abort()
            raise
        finally:
            self._record(exchange)

    def abandon(self) -> None:
        """End what still runs, each with an error."""
        self._abandoned = True
        for task in self.running:
            task.cancel()

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        """Whatever goes wrong is an answer too, or the last event of the stream."""
        try:
            try:
                async with asyncio.timeout(self._limits.deadline_seconds):
                    return await self._route(exchange)(exchange)
            except TimeoutError as error:
                seconds = self._limits.deadline_seconds
                raise ApiError(504, f"not done after {seconds:g} s, the limit here") from error
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if not self._abandoned or exchange.request.transport is None or task is None:
                    raise
                task.uncancel()
                raise ApiError(503, "the server is stopping", retry_after=5) from error
            except (ApiError, ClientGone):
                raise
            except Exception as error:
                # Where it happened, without what: values in its text could be a prompt's.
                frames = traceback.extract_tb(error.__traceback__)
                places = [f"{f.filename}:{f.lineno}" for f in frames[-3:]]
                access_log.event("fault", id=exchange.id, error=type(error).__name__, at=places)
                raise ApiError(500, "a fault in the server; its log says where") from error
        except ApiError as error:
            exchange.error, exchange.status = str(error), error.status
            if exchange.stream is None:
                return error.response()
            await send(exchange.stream, error.events(), self._limits.client_seconds)
            await exchange.stream.write_eof()
            return exchange.stream

    def _route(self, exchange: Exchange) -> Handler:
        request = exchange.request
        route = (request.method, request.path)
        if route in self._open:
            return self._open[route]
        self._key.check(request)
        if route in self._routes:
            return self._routes[route]
        if request.method == "GET" and request.path.startswith(_MODELS + "/"):
            return self._model  # names have slashes, as those of the hub, or %2F
        if any(request.path == path for _, path in (*self._open, *self._routes)):
            raise ApiError(405, f"{request.path} does not take {request.method[:20]}")
        raise ApiError(404, "no such route here")

    async def _live(self, _: Exchange) -> web.StreamResponse:
        return _json({"live": True})

    async def _health(self, exchange: Exchange) -> web.StreamResponse:
        ready = not self.draining and self._pool.ready
        asked_ready = exchange.request.path.endswith("/ready")
        return _json({"live": True, "ready": ready}, 503 if asked_ready and not ready else 200)

    async def _measured(self, _: Exchange) -> web.StreamResponse:
        text = await self._metrics.text(self._session)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, _: Exchange) -> web.StreamResponse:
        return _json({"object": "list", "data": [self._entry(n) for n in self._router.names]})

    async def _model(self, exchange: Exchange) -> web.StreamResponse:
        name = exchange.request.path.removeprefix(_MODELS + "/")
        self._router.model(name)
        return _json(self._entry(name))

    def _entry(self, name: str) -> dict[str, object]:
        return {
            "id": name, "object": "model", "created": self._started, "owned_by": "quantkit"
        }  # fmt: skip

    async def _passed(self, exchange: Exchange) -> web.StreamResponse:
        request = exchange.request
        if self.draining:
            raise ApiError(503, "the server is stopping", retry_after=5)
        if request.content_type != "application/json":
            # Also what keeps web pages out: a browser asks before it sends this type elsewhere.
            raise ApiError(415, "expected `Content-Type: application/json`")
        task = asyncio.current_task()
        assert task is not None
        self.running.add(task)
        try:
            async with self._bodies.read(request) as raw:
                body = Body.parse(raw)
                exchange.model = model = self._router.model(body.model)
                self._router.running(model, 1)
                try:
                    return await self._computed(exchange, model, body)
                finally:
                    self._router.running(model, -1)
        finally:
            self.running.discard(task)

    async def _computed(self, exchange: Exchange, model: str, body: Body) -> web.StreamResponse:
        """The answer of the first backend that takes it."""
        priority = exchange.request.headers.get("X-Priority")
        refusal: NotTaken | None = None
        for backend in self._router.candidates(model, body, priority):
            exchange.backend = backend
            if exchange.request.path == _CHAT and not backend.renders_chats:
                raise ApiError(
                    400,
                    f"{backend.name}: has no chat template, so it takes no messages; send a prompt "
                    "to /v1/completions",
                    param="messages",
                )
            for _ in range(backend.attempts):
                try:
                    async with backend.lease() as upstream:
                        return await forward(
                            self._session,
                            exchange,
                            upstream,
                            body,
                            self._metrics.of(model, backend),
                            self._limits.client_seconds,
                        )
                except Unreachable as error:
                    refusal = error
                except NotTaken as error:
                    refusal = error
                    break
        assert refusal is not None
        raise refusal

    def _record(self, exchange: Exchange) -> None:
        request, backend, model = exchange.request, exchange.backend, exchange.model or ""
        self._metrics.count(model, backend, exchange.status)
        prompt_tokens, output_tokens = exchange.tokens or (None, None)
        if backend is not None and exchange.tokens is not None:
            meters = self._metrics.of(model, backend)
            meters.prompt_tokens.inc(exchange.tokens[0])
            meters.output_tokens.inc(exchange.tokens[1])
        access_log.event(
            "request",
            id=exchange.id,
            client=request.remote,
            method=request.method[:20],
            path=request.path[:_LONGEST_PATH],
            model=exchange.model,
            backend=backend.name if backend else None,
            status=exchange.status,
            ms=round(1000 * (time.monotonic() - exchange.began), 1),
            ttft_ms=round(1000 * exchange.ttft, 1) if exchange.ttft is not None else None,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            error=exchange.error,
        )


def _json(content: object, status: int = 200) -> web.Response:
    return web.Response(
        body=json.dumps(content).encode(), status=status, content_type="application/json"
    )
