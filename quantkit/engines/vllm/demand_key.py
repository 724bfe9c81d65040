"""Start vLLM's OpenAI server so that its key is demanded on every route but ``/health``.

vLLM by itself asks for it on some of them: ``/invocations``, for one, computes for everybody.
Run by the toolchain's interpreter with the server's arguments, so it uses the standard library
only; ``DemandKey`` reaches vLLM as ``--middleware demand_key.DemandKey``.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import runpy
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

SERVER = "vllm.entrypoints.openai.api_server"
MIDDLEWARE = "demand_key.DemandKey"
_OPEN = ("/health",)
_REFUSAL = b'{"error": {"message": "Unauthorized", "type": "authentication_error", "code": 401}}'

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class DemandKey:
    """ASGI middleware: 401 for a request without ``$VLLM_API_KEY``."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._digest = _digest(b"Bearer " + os.environb[b"VLLM_API_KEY"])

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        if scope["type"] == "lifespan" or scope.get("path") in _OPEN or self._knows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows(self, scope: Message) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(_digest(scheme.title() + b" " + key.strip()), self._digest)


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


if __name__ == "__main__":
    # Last, so that nothing here hides what the toolchain has.
    sys.path.append(str(Path(__file__).parent))
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)
