"""Errors in the shape of OpenAI's API, as answers and as events of a stream."""

from __future__ import annotations

import json

from aiohttp import web

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    502: "engine_error",
    503: "unavailable_error",
    504: "timeout_error",
}
END = b"data: [DONE]\n\n"
"""The last event of a stream."""


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.retry_after = retry_after

    def body(self) -> bytes:
        """``{"error": {...}}``"""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": str(self),
            "type": _TYPES.get(self.status, usual),
            "param": self.param,
            "code": self.status,
        }
        return json.dumps({"error": error}).encode()

    def response(self) -> web.Response:
        """A whole answer."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        return web.Response(
            body=self.body(),
            status=self.status,
            headers=headers,
            content_type="application/json",
        )

    def events(self) -> bytes:
        """The end of a stream that has begun already."""
        return b"data: " + self.body() + b"\n\n" + END


class NotTaken(ApiError):
    """This backend did not take the request: another one may be asked."""


class Unreachable(NotTaken):
    """Nobody listens there."""
