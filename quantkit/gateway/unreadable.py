"""Whether an engine's 500 is about the request: it is asked only to read that request.

llama-server answers 500 to much that it cannot read, and to its own faults likewise.
"""

from __future__ import annotations

import asyncio
import json

import aiohttp

from quantkit.gateway.backends import Upstream

_ONLY_READ = {
    "/v1/chat/completions": "/apply-template",
    "/v1/completions": "/tokenize",
    "/tokenize": "/tokenize",
}
"""llama-server reads a request on these routes as on the others, and computes nothing."""
_SECONDS = 10.0


async def reason(
    session: aiohttp.ClientSession,
    upstream: Upstream,
    path: str,
    body: bytes,
    headers: dict[str, str],
    answer: bytes,
) -> str | None:
    """The engine's own words where ``answer``, its 500 to ``body``, comes from reading it: it says
    the same when it has nothing else to do. None for a fault of the engine's."""
    message = _message(answer)
    if message is None:
        return None
    try:
        async with (
            asyncio.timeout(_SECONDS),
            session.post(
                upstream.url + _ONLY_READ[path], data=body, headers=headers, allow_redirects=False
            ) as again,
        ):
            same = again.status == 500 and _message(await again.read()) == message
    except (aiohttp.ClientError, ConnectionError, TimeoutError):
        return None
    return message if same else None


def _message(answer: bytes) -> str | None:
    try:
        found = json.loads(answer)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
