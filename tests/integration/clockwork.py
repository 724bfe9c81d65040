"""A server of completions whose times, and how much it can do at once, are known."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 24


@dataclass
class Clockwork:
    """``first_s`` to the first token, ``next_s`` to each other; ``slots`` requests at a time, the
    others wait (None: any number). Every ``slow_every``-th first token takes ``slow_s``."""

    first_s: float = 0.1
    next_s: float = 0.02
    slots: int | None = None
    slow_every: int | None = None
    slow_s: float = 0.0
    url: str = ""
    arrivals: list[float] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    connections: set[str | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.room = threading.Semaphore(self.slots or 1_000_000)

    @property
    def request_s(self) -> float:
        return self.first_s + (OUTPUT_TOKENS - 1) * self.next_s


@contextlib.contextmanager
def ticking(clockwork: Clockwork) -> Iterator[Clockwork]:
    """The server, while the block runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

        def do_GET(self) -> None:
            models = json.dumps({"object": "list", "data": [{"id": "m"}]}).encode()
            self._begin(models)
            self.wfile.write(models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            clockwork.arrivals.append(time.time())
            clockwork.prompts.append(body["prompt"])
            clockwork.connections.add(self.headers.get("Connection"))
            count = len(clockwork.arrivals)
            slow = clockwork.slow_every is not None and count % clockwork.slow_every == 0
            with contextlib.suppress(ConnectionError):
                self._answer(clockwork.slow_s if slow else clockwork.first_s)

        def _answer(self, first_s: float) -> None:
            # What ends a line for Unicode ends no line of an event stream.
            choice = {"index": 0, "text": "\u2028\x85a"}
            token = _event({"object": "text_completion", "choices": [choice]})
            counted = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": OUTPUT_TOKENS}
            end = _event({"choices": [], "usage": counted}) + b"data: [DONE]\n\n"
            with clockwork.room:
                self._begin(token * OUTPUT_TOKENS + end)
                if not first_s and not clockwork.next_s:
                    self.wfile.write(token * OUTPUT_TOKENS + end)
                    return
                for number in range(OUTPUT_TOKENS):
                    time.sleep(first_s if number == 0 else clockwork.next_s)
                    self.wfile.write(token)
                self.wfile.write(end)

        def _begin(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:
            """Clients that hang up are part of the plan."""

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        clockwork.url = f"http://127.0.0.1:{server.server_port}"
        yield clockwork
        server.shutdown()


def _event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
