"""Several variants behind one endpoint, asked by the clients that people use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quantkit.formats.detect import open_variant
from tests.integration.gateways import CONTEXT, ENDLESS, KEY, LENGTH, QUANTKIT, Running, gateway
from tests.integration.servers import KEY as ENGINE_KEY
from tests.integration.servers import PATIENCE, running


@pytest.fixture(scope="module")
def variants(patient_llama: dict[str, Path]) -> dict[str, Path]:
    return patient_llama


@pytest.fixture(scope="module")
def served(
    variants: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Two engines here and one elsewhere, rules, and another name."""
    work = tmp_path_factory.mktemp("gateway")
    with running(open_variant(variants["Q8_0"]), work / "far.log") as far:
        config = {
            "backends": {
                "eight": {"path": str(variants["Q8_0"]), "context": CONTEXT, "slots": 2},
                "four": {"path": str(variants["Q4_0"]), "context": 2048, "slots": 2},
                "far": {"url": f"{far.url}/v1", "model": "m", "api_key_env": "FAR_KEY"},
                "nowhere": {"url": "http://127.0.0.1:9/v1"},
            },
            "models": {
                "eight": "eight",
                "four": "four",
                "far": "far",
                "either": [{"backend": ["nowhere", "far"]}],
                "mixed": [
                    {"priority": "batch", "backend": "far"},
                    {"prompt_characters_over": 100, "backend": "four"},
                    {"backend": "eight"},
                ],
            },
            "aliases": {"fast": "four"},
        }
        with gateway(work, config, FAR_KEY=ENGINE_KEY) as found:
            yield found


def ask(served: Running, model: str, **extra: Any) -> dict[str, Any]:
    """A short completion that always ends alike."""
    body = {"model": model, "prompt": "the list of", "max_tokens": 8, "temperature": 0, **extra}
    with served.http() as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def backend_of(served: Running, request_id: str) -> str | None:
    found: str | None = served.wait_for("request", id=request_id).get("backend")
    return found


def test_lists_models_and_their_other_names(served: Running) -> None:
    names = {model.id for model in served.openai().models.list()}
    assert names == {"eight", "four", "far", "either", "mixed", "fast"}


@pytest.mark.parametrize(("name", "upstream"), [("eight", "eight"), ("fast", "four"), ("far", "m")])
def test_a_name_reaches_its_engine(served: Running, name: str, upstream: str) -> None:
    assert ask(served, name)["model"] == upstream


def test_streams_and_whole_answers_say_the_same(served: Running) -> None:
    client = served.openai()
    messages: Any = [{"role": "user", "content": "the list"}]
    whole = client.chat.completions.create(
        model="eight", messages=messages, max_tokens=20, temperature=0
    )
    stream = client.chat.completions.create(
        model="eight", messages=messages, max_tokens=20, temperature=0, stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(parts) > 10
    assert "".join(parts) == whole.choices[0].message.content


def test_several_streams_at_once(served: Running) -> None:
    def count(model: str) -> int:
        stream = served.openai().completions.create(
            model=model, prompt="x", max_tokens=50, stream=True, extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        )  # fmt: skip
        *_, last = stream
        assert last.usage is not None
        return last.usage.completion_tokens

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(count, ["eight", "four"] * 8)) == [50] * 16


def test_what_routing_does_not_need_goes_through(served: Running) -> None:
    """JSON schema, logprobs and tools, on a name that the gateway must replace."""
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = served.openai().chat.completions.create(
        model="fast",
        messages=[{"role": "user", "content": "a number"}],
        max_tokens=60,
        logprobs=True,
        top_logprobs=3,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 3
    refused = httpx.post(
        f"{served.url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {KEY}"},
        json={"model": "fast", "messages": [], "tools": "not tools"},
    )
    assert "tools" in refused.json()["error"]["message"]  # the engine's own words


def test_tokenize(served: Running) -> None:
    with served.http() as http:
        tokens = http.post("/tokenize", json={"model": "four", "content": "the list"}).json()
    assert tokens["tokens"]


def test_rules_of_one_name(served: Running) -> None:
    def asked(number: int, prompt: str, priority: str | None = None) -> str | None:
        name = f"rule-{number}"
        headers = {"X-Request-Id": name} | ({"X-Priority": priority} if priority else {})
        with served.http() as http:
            body = {"model": "mixed", "prompt": prompt, "max_tokens": 1}
            answer = http.post("/v1/completions", json=body, headers=headers)
        assert answer.headers["X-Request-Id"] == name
        return backend_of(served, name)

    assert asked(1, "short") == "eight"
    assert asked(2, "long " * 30) == "four"
    assert asked(3, "long " * 30, "Batch") == "far"


def test_a_backend_that_is_not_there_is_passed_over(served: Running) -> None:
    assert [ask(served, "either")["model"] for _ in range(3)] == ["m"] * 3


def test_curl_with_a_stream(served: Running) -> None:
    body = json.dumps({"model": "fast", "prompt": "x", "max_tokens": 3, "stream": True})
    said = subprocess.check_output(
        ["curl", "-sN", f"{served.url}/v1/completions", "-H", f"Authorization: Bearer {KEY}",
         "-H", "Content-Type: application/json", "-d", body],
        text=True,
    )  # fmt: skip
    events = said.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events)


def test_guidellm(served: Running, variants: dict[str, Path], tmp_path: Path) -> None:
    """As its users start it: connections are kept, and every request is answered."""
    report = tmp_path / "report.json"
    subprocess.run(
        [sys.executable, "-m", "guidellm", "run", "--disable-console",
         "--backend", f"kind=openai_http,target={served.url},model=fast",
         "--tokenizer", f"kind=huggingface_auto,model={variants['Q4_0']}",
         "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
         "--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=12",
         "--output", f"kind=json,path={report}"],
        env=os.environ | {"GUIDELLM__SPEC__BACKEND__API_KEY": KEY, "NO_PROXY": "127.0.0.1"},
        capture_output=True, check=True, timeout=PATIENCE,
    )  # fmt: skip
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    assert totals["successful"] == totals["total"] > 0  # on a busy machine it forgets one
    assert metrics["output_token_count"]["successful"]["mean"] == 8


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_ends_the_work(served: Running, streamed: bool) -> None:
    """The engine says that it computes nothing any more, long before the answer was whole."""
    served.post("eight")
    before = served.metric("llamacpp:n_decode_total", backend="eight")
    if streamed:
        with served.streaming("eight") as stream:
            served.until("llamacpp:requests_processing", 1, backend="eight")
        name = stream.id
    else:
        name = "impatient"
        body = {"model": "eight", **ENDLESS}
        headers = {"X-Request-Id": name}
        with served.http() as http, pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, headers=headers, timeout=1)
    assert served.wait_for("request", id=name)["status"] == 499
    # llama-server looks whether a whole answer's client is there after each second in which it
    # finished nothing for anybody, metrics included: asked more often, it never looks.
    pause = 0.02 if streamed else 2.5
    served.until("llamacpp:requests_processing", 0, pause, backend="eight")
    assert served.metric("llamacpp:n_decode_total", backend="eight") - before < LENGTH


@pytest.mark.parametrize("key", ["wrong", KEY + "x", KEY[:-1], KEY.upper(), "ключ"])
def test_the_key_is_demanded(served: Running, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}".encode()}
    for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions"),
                         ("GET", "/anything")):  # fmt: skip
        assert httpx.request(method, served.url + path, headers=headers).status_code == 401
    assert httpx.get(f"{served.url}/health").json()["live"] is True


def test_engines_answer_the_gateway_only(served: Running) -> None:
    """They listen to this machine alone, each with a key that nobody knows."""
    ask(served, "eight")
    engine = served.engines()["eight"]
    words = engine.cmdline()
    assert words[words.index("--host") + 1] == "127.0.0.1"
    url = f"http://127.0.0.1:{words[words.index('--port') + 1]}/v1/completions"
    for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
        refused = httpx.post(url, json={"prompt": "x", "max_tokens": 1}, headers=headers)
        assert refused.status_code == 401


@pytest.mark.parametrize(
    "path", ["/slots", "/props", "/v1/embeddings", "/completion", "/v1/../slots", "/metrics/"]
)
def test_other_routes_of_the_engine_are_closed(served: Running, path: str) -> None:
    with served.http() as http:
        assert http.get(path).status_code == 404
        assert http.post(path, json={"model": "four"}).status_code == 404


def test_errors_have_the_shape_that_clients_know(served: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'eight'"):
        served.openai().completions.create(model="eigth", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        served.openai("wrong").models.list()


def test_metrics_of_gateway_and_engines(served: Running) -> None:
    ask(served, "eight")
    labels = {"backend": "eight", "engine": "llamacpp"}
    counted = served.metric("quantkit_output_tokens_total", **labels)
    body = {"model": "eight", "prompt": "x", "max_tokens": 9, "stream": True, "ignore_eos": True}
    with served.http() as http:
        http.post("/v1/completions", json=body)
    assert served.metric("quantkit_output_tokens_total", **labels) == counted + 9
    assert served.metric("quantkit_requests_total", **labels, status="200") > 1
    assert served.metric("quantkit_time_to_first_token_seconds_count", **labels) >= 1
    assert served.metric("quantkit_inter_token_latency_seconds_count", **labels) >= 8
    assert served.metric("quantkit_engine_up", **labels) == 1
    assert served.metric("quantkit_engine_memory_bytes", **labels) > 1 << 20
    assert served.metric("llamacpp:prompt_tokens_total", **labels) > 0


def test_no_prompt_in_the_log(served: Running) -> None:
    secret = "a very private sentence"
    with served.http() as http:
        for content in ({"prompt": secret}, {"prompt": [secret, 1]}, {"prompt": {secret: 1}}):
            http.post("/v1/completions", json={"model": "four", "max_tokens": 1, **content})
        http.post("/v1/completions", content=secret, headers={"Content-Type": "application/json"})
        http.get("/anything", headers={"X-Request-Id": "after"})
    served.wait_for("request", id="after")
    logs = [served.log, *(served.log.parent / "home" / "logs").rglob("*.log")]
    assert len(logs) >= 2
    assert not [log for log in logs if secret in log.read_text(errors="replace")]


def test_a_model_that_can_never_fit(variants: dict[str, Path]) -> None:
    done = subprocess.run(
        [*QUANTKIT, "serve", str(variants["Q8_0"]), "--memory-budget", "50MiB"],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 2
    assert "more than the memory budget of 0.05 GiB" in done.stderr
    assert done.stderr.count("\n") == 1
