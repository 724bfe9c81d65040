"""The gateway before another server that behaves badly, all in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from quantkit.gateway.answers import ApiError
from quantkit.gateway.app import Gateway
from quantkit.gateway.config import GatewayConfig
from quantkit.gateway.pool import Pool
from quantkit.gateway.proxy import new_session
from quantkit.gateway.routing import Router

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path))
    monkeypatch.setenv("FAR_KEY", "far")


@contextlib.asynccontextmanager
async def listening(handler: Any) -> AsyncIterator[int]:
    server = web.Server(handler, handler_cancellation=True, access_log=None)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await server.shutdown(0.1)


@contextlib.asynccontextmanager
async def between(answer: Answer, **limits: Any) -> AsyncIterator[str]:
    """The address of a gateway whose only backend is ``answer``."""
    async with listening(answer) as far:
        config = GatewayConfig.model_validate(
            {
                "backends": {
                    "m": {"url": f"http://127.0.0.1:{far}/v1", "model": "x",
                          "api_key_env": "FAR_KEY"}
                },
                "limits": limits,
            }
        )  # fmt: skip
        async with new_session() as session:
            gateway = Gateway(config, None, Pool(config), session)
            async with listening(gateway.handle) as port:
                yield f"http://127.0.0.1:{port}"


async def ask(
    url: str, body: Any = None, path: str = "/v1/completions", **headers: str
) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + path, json=body or {"model": "m"}, headers=headers) as got,
    ):
        return got.status, await got.read()


def streamed(*chunks: bytes, pause: float = 0.0, broken: bool = False) -> Answer:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(pause)
        if broken:
            assert request.transport is not None
            request.transport.abort()
        await response.write_eof()
        return response

    return answer


def test_only_what_is_needed_goes_out(home: None) -> None:
    """The body but for the name, our own key, the request's id; nothing else of the client's."""
    seen: list[tuple[Mapping[str, str], bytes]] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        seen.append((request.headers, await request.read()))
        return web.json_response({"ok": 1}, headers={"Set-Cookie": "a=b", "X-Inner": "c"})

    async def scenario() -> None:
        body = {"model": "m", "n": 1.25, "é": ["ü", {"a": None}], "big": 2**70}
        async with between(answer) as url, aiohttp.ClientSession() as session:
            headers = {
                "Authorization": "Bearer client", "Cookie": "c=d", "X-Request-Id": "r-1",
                "X-Forwarded-For": "1.2.3.4",
            }  # fmt: skip
            async with session.post(f"{url}/v1/completions", json=body, headers=headers) as got:
                assert await got.json() == {"ok": 1}
                assert not {"Set-Cookie", "X-Inner"} & set(got.headers)
        headers, raw = seen[0]
        assert json.loads(raw) == body | {"model": "x"}
        assert headers["Authorization"] == "Bearer far"
        assert headers["X-Request-Id"] == "r-1"
        assert "Cookie" not in headers
        assert "X-Forwarded-For" not in headers

    asyncio.run(scenario())


def test_a_body_that_names_the_model_so_is_not_touched() -> None:
    raw = b'{ "model":"x",  "a":1e2, "a" : 3 }'
    seen: list[bytes] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(await request.read())
        return web.json_response({})

    async def scenario() -> None:
        async with listening(answer) as far:
            config = GatewayConfig.model_validate(
                {"backends": {"x": {"url": f"http://127.0.0.1:{far}"}}}
            )
            async with new_session() as session, aiohttp.ClientSession() as client:
                gateway = Gateway(config, None, Pool(config), session)
                async with listening(gateway.handle) as port:
                    headers = {"Content-Type": "application/json"}
                    url = f"http://127.0.0.1:{port}/v1/completions"
                    await client.post(url, data=raw, headers=headers)
        assert seen == [raw]

    asyncio.run(scenario())


def test_a_stream_that_breaks_off_within_an_event() -> None:
    answer = streamed(b'data: {"a": 1}\n\nda', b'ta: {"b', pause=0.05, broken=True)

    async def scenario() -> None:
        async with between(answer) as url:
            status, text = await ask(url)
        events = text.decode().removesuffix("\n\n").split("\n\n")
        assert status == 200
        assert events[0] == 'data: {"a": 1}'
        assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == 502
        assert events[2:] == ["data: [DONE]"]

    asyncio.run(scenario())


def test_a_stream_without_an_end_is_an_error() -> None:
    async def scenario() -> None:
        async with between(streamed(b'data: {"a": 1}\n\n')) as url:
            assert b"broke off" in (await ask(url))[1]
        own = b'data: {"error": {"message": "out of slots"}}\n\n'
        async with between(streamed(own)) as url:
            assert (await ask(url))[1] == own

    asyncio.run(scenario())


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_events_are_not_held_back(end: bytes) -> None:
    """The first is there before the second is written."""

    async def scenario() -> None:
        go_on = asyncio.Event()

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"data: 1" + end)
            await go_on.wait()
            await response.write(b"data: [DONE]" + end)
            await response.write_eof()
            return response

        async with (
            between(answer) as url,
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/completions", json={"model": "m"}) as got,
        ):
            first = await asyncio.wait_for(got.content.readany(), 5)
            assert first == b"data: 1" + end
            go_on.set()
            assert await got.content.read() == b"data: [DONE]" + end

    asyncio.run(scenario())


@pytest.mark.parametrize("status", [401, 403])
def test_a_backend_that_refuses_our_key(status: int) -> None:
    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"error": "the key far is wrong"}, status=status)

    async def scenario() -> None:
        async with between(answer) as url:
            got, text = await ask(url)
        assert got == 502
        assert b"the key far" not in text

    asyncio.run(scenario())


def test_its_other_errors_and_redirects_are_passed_on_unfollowed() -> None:
    async def scenario() -> None:
        for status in (302, 400, 429, 500):

            async def answer(_: web.BaseRequest, status: int = status) -> web.StreamResponse:
                headers = {"Location": "http://127.0.0.1:9/", "Retry-After": "7"}
                return web.Response(status=status, body=b"{}", headers=headers)

            async with (
                between(answer) as url,
                aiohttp.ClientSession() as session,
                session.post(
                    f"{url}/v1/completions", json={"model": "m"}, allow_redirects=False
                ) as got,
            ):
                assert (got.status, got.headers["Retry-After"]) == (status, "7")
                assert "Location" not in got.headers

    asyncio.run(scenario())


def test_deadline_of_a_stream() -> None:
    answer = streamed(*[b"data: {}\n\n"] * 100, pause=0.05)

    async def scenario() -> None:
        async with between(answer, deadline_seconds=0.3) as url:
            text = (await ask(url))[1]
        assert b"not done after 0.3 s" in text
        assert text.endswith(b"data: [DONE]\n\n")
        assert 1 < text.count(b"data: {}") < 20

    asyncio.run(scenario())


def test_a_client_that_does_not_read_is_dropped() -> None:
    """And its backend's connection is closed, long before the deadline."""

    async def scenario() -> None:
        ended = asyncio.Event()

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            try:
                while True:
                    await response.write(b"data: " + b"x" * 100_000 + b"\n\n")
            finally:
                ended.set()

        async with between(answer, client_seconds=0.5) as url:
            port = int(url.rpartition(":")[2])
            body = b'{"model": "m"}'
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
                )
                await asyncio.wait_for(ended.wait(), 20)

    asyncio.run(scenario())


@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_takes_its_backend_along(begun: bool) -> None:
    """The connection to the backend is closed, whether an answer has begun or not."""

    async def scenario() -> None:
        reached, ended = asyncio.Event(), asyncio.Event()

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            try:
                if begun:
                    await response.prepare(request)
                    await response.write(b"data: 1\n\n")
                reached.set()
                await asyncio.sleep(60)
            finally:
                ended.set()
            return response

        async with between(answer) as url:
            asking = asyncio.create_task(ask(url))
            await asyncio.wait_for(reached.wait(), 20)
            assert not ended.is_set()
            asking.cancel()
            await asyncio.wait_for(ended.wait(), 20)

    asyncio.run(scenario())


def test_without_a_key_only_names_of_this_machine_are_answered() -> None:
    """What a web page does that has its own name point to 127.0.0.1."""

    async def scenario() -> None:
        async with between(streamed(b"data: [DONE]\n\n")) as url:
            assert (await ask(url, Host="evil.example:80"))[0] == 403
            assert (await ask(url, Host="localhost:80"))[0] == 200
            assert (await ask(url, **{"Content-Type": "text/plain"}))[0] == 415

    asyncio.run(scenario())


def test_a_fault_of_ours_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a very private sentence")

    monkeypatch.setattr("quantkit.gateway.routing.Router.candidates", fail)

    async def scenario() -> None:
        async with between(streamed()) as url:
            status, text = await ask(url)
        assert status == 500
        assert b"private" not in text

    asyncio.run(scenario())
    said = capfd.readouterr().err
    assert "RuntimeError" in said
    assert "private" not in said


@pytest.mark.parametrize(
    ("path", "reads"),
    [
        ("/v1/chat/completions", "/apply-template"),
        ("/v1/completions", "/tokenize"),
        ("/tokenize", "/tokenize"),
    ],
)
def test_a_request_that_the_engine_cannot_read_is_the_clients_fault(
    path: str, reads: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Told from a fault of the engine's own by what it says when it only reads the same."""
    seen: list[str] = []

    def scenario(told: Mapping[str, tuple[int, Any]]) -> tuple[int, Any]:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            seen.append(request.path)
            assert (await request.json())["model"] == "x"
            assert request.headers["Authorization"] == "Bearer far"
            status, content = told.get(request.path, (404, {}))
            return web.json_response(content, status=status)

        async def asked() -> tuple[int, bytes]:
            async with between(answer) as url:
                return await ask(url, path=path)

        status, text = asyncio.run(asked())
        return status, json.loads(text)

    def fault(message: str) -> tuple[int, Any]:
        return 500, {"error": {"code": 500, "message": message, "type": "server_error"}}

    unread = fault("cannot parse: a very private sentence")
    assert scenario({path: unread, reads: unread}) == (
        400,
        {
            "error": {
                "message": "cannot parse: a very private sentence",
                "type": "invalid_request_error",
                "param": None,
                "code": 400,
            }
        },
    )
    said = capfd.readouterr().err
    assert "the engine cannot read the request" in said
    assert "private" not in said
    assert seen == [path, reads]
    if path != reads:
        for other in ((200, {"prompt": "x"}), fault("Compute error"), (500, "?"), (404, {})):
            assert scenario({path: unread, reads: other}) == unread
        assert scenario({path: (500, {"error": "?"}), reads: unread}) == (500, {"error": "?"})


def test_the_only_model_need_not_be_named() -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response(await request.json())

    async def scenario() -> None:
        async with between(answer) as url:
            for body in ({"n": 1}, {"n": 1, "model": None}):
                status, text = await ask(url, body)
                assert (status, json.loads(text)) == (200, {"n": 1, "model": "x"})
            assert (await ask(url, {"model": 5}))[0] == 400

    asyncio.run(scenario())


def test_one_of_several_must_be_named() -> None:
    far = {"url": "http://127.0.0.1:9"}
    config = GatewayConfig.model_validate({"backends": {"a": far, "b": far}})
    with pytest.raises(ApiError, match="`model` is missing") as refused:
        Router(config, {}).model(None)
    assert (refused.value.status, refused.value.param) == (400, "model")


def test_one_model_by_its_name() -> None:
    """Also a name with slashes, as it is or escaped, and an alias with a comma."""
    config = GatewayConfig.model_validate(
        {
            "backends": {"org/m": {"url": "http://127.0.0.1:9"}},
            "aliases": {"a,b": "org/m"},
        }
    )

    async def scenario() -> None:
        async with new_session() as session, aiohttp.ClientSession() as client:
            gateway = Gateway(config, "key", Pool(config), session)
            async with listening(gateway.handle) as port:

                async def get(name: str, key: str = "key") -> tuple[int, Any]:
                    url = URL(f"http://127.0.0.1:{port}/v1/models{name}", encoded=True)
                    headers = {"Authorization": f"Bearer {key}"}
                    async with client.get(url, headers=headers) as got:
                        return got.status, await got.json()

                listed = {one["id"]: one for one in (await get(""))[1]["data"]}
                for name in ("org/m", "a,b"):
                    for escaped in (name, quote(name, safe="")):
                        assert await get(f"/{escaped}") == (200, listed[name])
                status, content = await get("/a,c")
                assert status == 404
                assert content["error"]["type"] == "invalid_request_error"
                assert "did you mean 'a,b'" in content["error"]["message"]
                assert (await get("/"))[0] == 404
                assert (await get("/org/m", key="wrong"))[0] == 401

    asyncio.run(scenario())
