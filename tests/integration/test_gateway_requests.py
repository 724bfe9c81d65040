"""What a request may say that an engine trips over; what an answer of several choices counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from tests.integration import odd_requests
from tests.integration.gateways import KEY, Running, gateway
from tests.integration.servers import KEY as ENGINE_KEY
from tests.integration.servers import Running as Engine
from tests.integration.servers import running
from tests.models import make_checkpoint

SLOTS = 4
USER = {"role": "user", "content": "a list of"}
SAMPLED = {"max_tokens": 12, "temperature": 1, "seed": 7, "ignore_eos": True}
CHAT = {"messages": [USER], **SAMPLED}


@pytest.fixture(scope="module")
def variants(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama, and one that was never told how a chat looks."""
    out = tmp_path_factory.mktemp("variants")
    plain = make_checkpoint(out / "source")
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    made = {"m": tiny_llama, "plain": plain}
    return {
        name: convert(Checkpoint.open(path), Spec("gguf", "Q8_0"), None, out / name).path
        for name, path in made.items()
    }


@pytest.fixture(scope="module")
def engine(variants: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The engine itself."""
    log = tmp_path_factory.mktemp("engine") / "log"
    with running(open_variant(variants["m"]), log) as found:
        yield found


@pytest.fixture(scope="module")
def served(
    variants: dict[str, Path], engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    one = {"context": 256, "slots": SLOTS}
    config = {
        "backends": {
            "m": {"path": str(variants["m"]), **one},
            "plain": {"path": str(variants["plain"]), **one},
            "plain, given": {
                "path": str(variants["plain"]),
                "engine": {"name": "llamacpp", "chat_template": "chatml"},
                **one,
            },
            "far": {"url": f"{engine.url}/v1", "model": "m", "api_key_env": "FAR_KEY"},
        },
        "aliases": {"org/m, the best": "m"},
    }
    with gateway(tmp_path_factory.mktemp("requests"), config, FAR_KEY=ENGINE_KEY) as found:
        yield found


def post(served: Running, path: str, **body: Any) -> httpx.Response:
    with served.http() as http:
        return http.post(path, json={"model": "m", **body})


def ask(served: Running, path: str, **body: Any) -> Any:
    answer = post(served, path, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_no_request_is_a_fault_of_the_server(served: Running) -> None:
    """Each is answered, or refused in the shape of OpenAI's API; the engine goes on."""
    served.post("m")
    before = served.engines()["m"]
    bad = {}
    headers = {"Content-Type": "application/json"}
    with served.http() as http:
        for name, odd in odd_requests.requests("m"):
            answer = http.post(odd.path, content=odd.body, headers=headers)
            refused = answer.status_code == 400 and odd_requests.is_refusal(answer)
            if answer.status_code != 200 and not refused:
                bad[name] = f"{answer.status_code} {answer.text[:300]}"
    assert bad == {}
    assert served.engines()["m"] == before
    assert served.events("fault") == []


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (
            [USER, {"role": "assistant", "tool_calls": [{"id": None, "type": "function",
             "function": {"name": "f", "arguments": "{}"}}]}],
            "parse messages",
        ),
        ([USER | {"name": None}], "parse messages"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "image input is not supported",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model", ["m", "far"])
def test_what_the_engine_cannot_read_is_refused_in_its_words(
    served: Running, engine: Engine, model: str, messages: list[Any], says: str
) -> None:
    body = {"model": model, "messages": messages}
    headers = {"Authorization": f"Bearer {ENGINE_KEY}"}
    alone = httpx.post(f"{engine.url}/v1/chat/completions", json=body, headers=headers)
    assert alone.status_code == 500
    answer = post(served, "/v1/chat/completions", **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert says in error["message"]
    assert error == alone.json()["error"] | {
        "type": "invalid_request_error", "code": 400, "param": None
    }  # fmt: skip


def test_a_model_without_a_chat_template(served: Running) -> None:
    """Refused before its engine is started for it; prompts and a template of one's own work."""
    with pytest.raises(openai.BadRequestError, match="plain: has no chat template") as refused:
        served.openai().chat.completions.create(model="plain", messages=[USER])  # type: ignore[list-item]
    assert refused.value.param == "messages"
    assert "plain" not in served.engines()
    assert served.post("plain").status_code == 200
    answer = ask(served, "/v1/chat/completions", model="plain, given", **CHAT)
    assert answer["model"] == "plain- given"


def test_one_model_by_its_name(served: Running) -> None:
    models = served.openai().models
    for name in ("m", "org/m, the best"):
        assert models.retrieve(name) in list(models.list())
        assert served.post(name).status_code == 200
    with pytest.raises(openai.NotFoundError, match="no model 'x' here"):
        models.retrieve("x")


def alone(engine: Engine, path: str, **body: Any) -> list[dict[str, Any]]:
    """The ``usage`` of each answer, as the engine's stream tells it."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    headers = {"Authorization": f"Bearer {ENGINE_KEY}"}
    text = httpx.post(
        engine.url + path, json={"model": "m", **body, **options}, headers=headers, timeout=60
    ).text
    return [event["usage"] for event in events(text) if event and event.get("usage")]


def events(text: str) -> list[dict[str, Any]]:
    lines = text.removesuffix("data: [DONE]\n\n").split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def counted(served: Running) -> tuple[float, float]:
    of_model = {"model": "m"}
    return (
        served.metric("quantkit_prompt_tokens_total", **of_model),
        served.metric("quantkit_output_tokens_total", **of_model),
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "n": 3}),
        ("/v1/chat/completions", {**CHAT, "n": 3, "ignore_eos": False, "stop": [" the"]}),
        ("/v1/completions", {**SAMPLED, "prompt": "a list", "n": 3}),
        ("/v1/completions", {**SAMPLED, "prompt": ["a", "the list of"], "n": 2}),
        ("/v1/completions", {**SAMPLED, "prompt": [[5, 6, 7], [8]]}),
    ],
)
def test_usage_is_of_all_choices(
    served: Running, engine: Engine, path: str, body: dict[str, Any]
) -> None:
    """Prompt tokens once, output tokens of each choice: whole, in a stream and in the metrics."""
    told = alone(engine, path, **body)
    prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    assert len(told) == prompts * body.get("n", 1) > 1
    output = sum(one["completion_tokens"] for one in told)
    of_prompts = sum(one["prompt_tokens"] for one in told) // body.get("n", 1)
    expected = {
        "prompt_tokens": of_prompts,
        "completion_tokens": output,
        "total_tokens": of_prompts + output,
    }

    before = counted(served)
    whole = ask(served, path, **body)
    assert expected.items() <= whole["usage"].items()
    assert len(whole["choices"]) == len(told)
    after = counted(served)
    assert (after[0] - before[0], after[1] - before[1]) == (of_prompts, output)

    for options in ({"stream_options": {"include_usage": True}}, {}):
        before = counted(served)
        stream = post(served, path, **body, stream=True, **options).text
        assert stream.endswith("data: [DONE]\n\n")
        found = events(stream)
        usages = [event["usage"] for event in found if "usage" in event]
        if options:
            assert len(usages) == 1
            assert usages == [found[-1]["usage"]]
        for usage in usages:
            assert expected.items() <= usage.items()
        ends = [c["finish_reason"] for event in found for c in event["choices"]]
        assert len(ends) - ends.count(None) == len(told)
        after = counted(served)
        assert (after[0] - before[0], after[1] - before[1]) == (of_prompts, output)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"logprobs": True, "top_logprobs": 2},
        {"response_format": {"type": "json_object"}, "ignore_eos": False},
    ],
)
def test_a_whole_answer_of_several_choices_is_the_engines_own(
    served: Running, engine: Engine, extra: dict[str, Any]
) -> None:
    """But for ``usage``: what the engine gives whole and what is put together are the same."""
    check_same(served, engine, "/v1/chat/completions", CHAT | extra)
    if "response_format" not in extra:
        body = {**SAMPLED, "prompt": "a list", **extra}
        if "logprobs" in extra:
            body["logprobs"] = 2
        check_same(served, engine, "/v1/completions", body)


def check_same(served: Running, engine: Engine, path: str, body: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {ENGINE_KEY}"}
    # One after the other, so that each is computed in the same batches.
    asked = {"model": "m", **body, "n": 2, "temperature": 0}
    whole = httpx.post(engine.url + path, json=asked, headers=headers, timeout=60).json()
    found = ask(served, path, **asked)
    for answer in (whole, found):
        for changing in ("id", "created", "usage"):
            assert answer.pop(changing)
        answer.pop("timings", None)
    assert found == whole


def test_an_error_of_several_choices(served: Running) -> None:
    answer = post(served, "/v1/completions", prompt="x " * 1000, n=2)
    assert answer.status_code == 400
    assert "context" in answer.json()["error"]["message"]
    assert post(served, "/v1/completions", prompt="x", n=SLOTS + 1).status_code == 400
    assert KEY not in answer.text
