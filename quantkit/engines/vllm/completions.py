"""The one call of vLLM's OpenAI API that quantkit makes, over the loopback interface."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from quantkit.engines.process import Process
from quantkit.errors import EngineError

HOST = "127.0.0.1"
_SECONDS = 1800
"""Seconds without an answer from the server: a long prompt on a slow CPU takes that long."""


@dataclass(frozen=True)
class Completions:
    """``/v1/completions`` of a running server; any number of threads may ask."""

    process: Process
    port: int
    api_key: str
    model: str

    def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer. Raise EngineError where the server refuses or has ended."""
        with self._posted(body) as response, self._talking():
            found: dict[str, Any] = json.loads(response.read())
            return found

    @contextmanager
    def stream(self, body: Mapping[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The answer's parts as they come; the server gives up what is left on leaving."""
        with self._posted({**body, "stream": True}) as response:
            yield self._parts(response)

    def _parts(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        with self._talking():
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if data == b"[DONE]":
                    return
                if data:
                    part = json.loads(data)
                    if "error" in part:
                        raise EngineError(f"{self.process.name} broke off: {_reason(part)}")
                    yield part
        raise self.process.error("broke off in the middle of an answer")

    @contextmanager
    def _posted(self, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=_SECONDS)
        headers = {
            "Authorization": f"Bearer {self.api_key}",
            "Content-Type": "application/json",
            "Connection": "close",
        }
        content = json.dumps({"model": self.model, **body})
        with closing(connection):
            with self._talking():
                connection.request("POST", "/v1/completions", content, headers)
                response = connection.getresponse()
                if response.status != http.client.OK:
                    reason = f"{response.status} {_reason(json.loads(response.read()))}"
                    raise EngineError(f"{self.process.name} refused a request: {reason}")
            with response:
                yield response

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise self.process.error(f"did not answer a request ({error!r})") from error


def _reason(answer: Any) -> str:
    """The first line of what an error says."""
    found = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = found.get("message") if isinstance(found, dict) else None
    return str(message or found).splitlines()[0][:300]
