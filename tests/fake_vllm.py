"""A server that answers ``/v1/completions`` in vLLM's words, of a model that is easy to recompute.

``python -m tests.fake_vllm PORT KEY WRITTEN``: WRITTEN is a file that receives the prompt of each
answer that was streamed to its end.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

VOCABULARY = 32
POISON = 31
"""A prompt that begins with it is refused; an answer after two of them breaks off."""


def log_probs(prompt: Sequence[int]) -> list[float]:
    """Of the token that follows: ``VOCABULARY`` values, in nats."""
    drawn = random.Random(repr(list(prompt)))
    logits = [drawn.gauss(0, 2) for _ in range(VOCABULARY)]
    total = math.log(sum(map(math.exp, logits)))
    return [logit - total for logit in logits]


def likeliest(prompt: Sequence[int]) -> int:
    found = log_probs(prompt)
    return found.index(max(found))


class _Handler(BaseHTTPRequestHandler):
    key: str
    written: Path

    def do_GET(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"]
        if self.headers["Authorization"] != f"Bearer {self.key}":
            self._answer(401, {"error": {"message": "Unauthorized"}})
        elif isinstance(prompt, str):
            self._answer(200, {"choices": [{"text": " Paris"}]})
        elif prompt[0] == POISON and prompt[1] != POISON:
            self._answer(400, {"error": {"message": "no such token\nsecond line"}})
        elif body["temperature"] != 0 or not body["ignore_eos"]:
            self._answer(400, {"error": {"message": "not greedy"}})
        elif body.get("stream"):
            self._stream(prompt, body)
        else:
            self._score(prompt, body)

    def log_message(self, *_: Any) -> None:
        pass

    def _score(self, prompt: list[int], body: dict[str, Any]) -> None:
        assert body["max_tokens"] == 1
        assert (
            body["logprobs"]
            == len(body["logprob_token_ids"])
            == len(set(body["logprob_token_ids"]))
        )
        following = log_probs(prompt)
        named = {likeliest(prompt), *body["logprob_token_ids"]}
        inside = None
        if body["prompt_logprobs"] is not None:
            inside = [None]
            for at in range(1, len(prompt)):
                found = log_probs(prompt[:at])
                tokens = {prompt[at], found.index(max(found))}
                inside.append({str(token): {"logprob": found[token]} for token in tokens})
        choice = {
            "logprobs": {"top_logprobs": [{f"token_id:{t}": following[t] for t in named}]},
            "prompt_logprobs": inside,
        }
        self._answer(200, {"choices": [choice]})

    def _stream(self, prompt: list[int], body: dict[str, Any]) -> None:
        self.send_response(200)
        self.end_headers()
        ids = list(prompt)
        for count in range(body["max_tokens"]):
            ids.append(likeliest(ids))
            self._event({"choices": [{"token_ids": [ids[-1]], "text": "x"}]})
            if prompt[0] == POISON and count == 1:
                self._event({"error": {"message": "the engine died"}})
                return
        self._event({"choices": [{"text": ""}]})
        with self.written.open("a") as file:
            file.write(f"{prompt}\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    _Handler.key, _Handler.written = sys.argv[2], Path(sys.argv[3])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()
