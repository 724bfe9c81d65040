"""llama.cpp for those who wait and vLLM for batches, under one name; then vLLM alone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from quantkit import toolchains
from quantkit.errors import ToolchainError
from quantkit.system.home import home
from tests.integration import odd_requests
from tests.integration.gateways import CONTEXT, LENGTH, Running, gateway, wait_until
from tests.integration.servers import PATIENCE, tree, wait_until_gone

BULK = {"backend": "bulk", "engine": "vllm"}
KINDS = ("prompt", "output")
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "enum": [1, 2]}},
    "required": ["n"],
    "additionalProperties": False,
}


def with_toolchain(work: Path) -> Path:
    """``work``, where a gateway finds vLLM; skip where there is none."""
    try:
        toolchains.find("vllm")
    except ToolchainError as error:
        pytest.skip(str(error))
    (work / "home").mkdir()
    (work / "home" / "toolchains").symlink_to(home() / "toolchains")
    return work


@pytest.fixture(scope="module")
def served(
    patient_llama: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    work = with_toolchain(tmp_path_factory.mktemp("mixed"))
    one = {"context": CONTEXT, "slots": 4, "preload": True}
    # Or a model that knows nothing writes spaces for ever where JSON allows them.
    compact = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
    tools = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    config = {
        "backends": {
            "quick": {"path": str(patient_llama["Q8_0"]), **one},
            "bulk": {
                "path": str(patient_llama["source"]),
                "engine": {"name": "vllm", "structured_outputs_config": compact, **tools},
                **one,
            },
        },
        "models": {
            "assistant": [{"priority": "batch", "backend": "bulk"}, {"backend": "quick"}],
            "bulk": "bulk",
        },
    }
    with gateway(work, config) as found:
        found.wait_for("engine ready", backend="bulk")
        yield found


def ask(served: Running, content: str, **extra: Any) -> Any:
    """A chat with vLLM through the client that people use."""
    messages: Any = [{"role": "user", "content": content}]
    client = served.openai()
    return client.chat.completions.create(model="bulk", messages=messages, **extra)


def test_one_name_for_both(served: Running) -> None:
    """Batches and single requests side by side: each is computed where the rule says."""

    def asked(number: int) -> tuple[bool, str]:
        batch = number % 2 == 1
        headers = {"X-Priority": "batch"} if batch else {}
        with served.http() as http:
            body = {"model": "assistant", "prompt": f"{number}", "max_tokens": 20}
            answer = http.post("/v1/completions", json=body, headers=headers).json()
        assert answer["usage"]["completion_tokens"] > 0
        return batch, answer["model"]

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(asked, range(16)))
    assert found == {(True, "bulk"), (False, "quick")}


def test_what_routing_does_not_need_reaches_vllm(served: Running) -> None:
    """JSON schema with log-probabilities, a tool, and its own form of /tokenize."""
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    (choice,) = ask(
        served, "a number", max_tokens=60, logprobs=True, top_logprobs=3, response_format=form
    ).choices
    assert json.loads(choice.message.content)["n"] in (1, 2)
    assert len(choice.logprobs.content[0].top_logprobs) == 3
    function = {"name": "set_n", "parameters": SCHEMA, "strict": True}
    tool: Any = {"type": "function", "function": function}
    (choice,) = ask(
        served, "a number", max_tokens=300, tools=[tool],
        tool_choice={"type": "function", "function": {"name": "set_n"}},
    ).choices  # fmt: skip
    (call,) = choice.message.tool_calls
    assert call.function.name == "set_n"
    assert json.loads(call.function.arguments)["n"] in (1, 2)
    with served.http() as http:
        tokens = http.post("/tokenize", json={"model": "bulk", "prompt": "the list"}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0


def test_no_request_is_a_fault_of_the_server(served: Running) -> None:
    """Each is answered, or refused in the shape of OpenAI's API; vLLM goes on."""
    before = served.engines()["bulk"]
    bad = {}
    headers = {"Content-Type": "application/json"}
    with served.http() as http:
        for name, odd in odd_requests.requests("bulk"):
            answer = http.post(odd.path, content=odd.body, headers=headers)
            refused = answer.status_code == 400 and odd_requests.is_refusal(answer)
            if answer.status_code != 200 and not refused:
                bad[name] = f"{answer.status_code} {answer.text[:300]}"
    assert bad == {}
    assert served.engines()["bulk"] == before


@pytest.mark.parametrize("streamed", [True, False])
def test_usage_is_of_all_choices(served: Running, streamed: bool) -> None:
    """As vLLM says it by itself: prompt tokens once, output tokens of each choice."""
    before = [served.metric(f"quantkit_{kind}_tokens_total", **BULK) for kind in KINDS]
    body = {"model": "bulk", "prompt": [[5, 6, 7], [8]], "n": 2, "max_tokens": 9}
    body |= {"ignore_eos": True, "temperature": 1}
    options = {"stream": True, "stream_options": {"include_usage": True}} if streamed else {}
    with served.http() as http:
        answer = http.post("/v1/completions", json=body | options)
    if streamed:
        usage = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))["usage"]
    else:
        usage = answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 36)
    after = [served.metric(f"quantkit_{kind}_tokens_total", **BULK) for kind in KINDS]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 36]


def test_metrics_of_vllm_and_of_the_gateway(served: Running) -> None:
    before = served.metric("quantkit_output_tokens_total", **BULK)
    theirs = served.metric("vllm:generation_tokens_total", **BULK)
    with served.http() as http:
        body = {"model": "bulk", "prompt": "x", "max_tokens": 9, "ignore_eos": True}
        text = http.post("/v1/completions", json=body | {"stream": True}).text
    assert text.endswith("data: [DONE]\n\n")
    assert served.metric("quantkit_output_tokens_total", **BULK) == before + 9
    served.until("vllm:generation_tokens_total", theirs + 9, **BULK)
    assert served.metric("quantkit_time_to_first_token_seconds_count", **BULK) >= 1
    assert served.metric("quantkit_engine_up", **BULK) == 1
    assert served.metric("quantkit_engine_memory_bytes", **BULK) > 100 << 20


def test_a_client_that_leaves_ends_the_work(served: Running) -> None:
    before = served.metric("vllm:generation_tokens_total", **BULK)
    with served.streaming("bulk") as stream:
        stream.until_more()
    assert served.wait_for("request", id=stream.id)["status"] == 499
    served.post("bulk")  # vLLM counts anew when it computes
    served.until("vllm:num_requests_running", 0, **BULK)
    assert served.metric("vllm:generation_tokens_total", **BULK) - before < LENGTH


def test_no_prompt_in_the_log(served: Running) -> None:
    secret = "a very private sentence"
    ask(served, secret, max_tokens=1)
    (log,) = served.log.parent.glob("home/logs/*/bulk.log")
    assert secret not in served.log.read_text()
    assert secret not in log.read_text(errors="replace")


def test_the_part_of_vllm_that_computes_is_killed(served: Running) -> None:
    """The stream ends with an error, llama.cpp goes on, and vLLM is started again."""
    server = served.engines()["bulk"]
    with served.streaming("bulk") as stream:
        for process in tree(server.pid)[1:]:
            process.kill()
        lines = stream.rest()
    assert served.post("assistant").status_code == 200
    assert len(lines) < LENGTH
    assert lines[-1] == "data: [DONE]"
    assert '"error"' in lines[-2]
    assert served.wait_for("request", id=stream.id)["status"] == 502
    served.wait_for("engine died", backend="bulk")
    wait_until(lambda: "bulk" in served.engines() and served.engines()["bulk"] != server)


def test_one_model_alone(patient_llama: dict[str, Path], tmp_path: Path) -> None:
    """Ready once it answers, with the gateway's routes, and gone after Ctrl-C."""
    options = ("--engine", "vllm", "--context", "256", "--slots", "2")
    with gateway(with_toolchain(tmp_path), None, str(patient_llama["source"]), *options) as served:
        wait_until(lambda: "ready: http" in served.log.read_text(), served.log.read_text)
        (model,) = served.openai().models.list()
        assert served.openai().models.retrieve(model.id) == model
        family = tree(served.process.pid)
        assert served.post(model.id).status_code == 200
        with served.http() as http:
            assert http.get("/version").status_code == 404
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(PATIENCE) == 0
        wait_until_gone(family)
