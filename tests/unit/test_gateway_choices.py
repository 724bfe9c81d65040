"""Several choices as llama-server tells them; with the real one: test_gateway_requests.py."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit.gateway.choices import SummedEvents, assembled


def told(prompt: int, cached: int, output: int) -> dict[str, Any]:
    timings = {"cache_n": cached, "prompt_n": prompt - cached, "predicted_n": output}
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return {"usage": usage, "timings": timings}


def stream(*events: dict[str, Any] | None) -> bytes:
    data = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
    return "".join([*data, "data: [DONE]\n\n"]).encode()


def chat(*parts: tuple[int, Any], end: str | None = None) -> dict[str, Any]:
    choices = [{"index": i, "delta": delta, "finish_reason": end} for i, delta in parts]
    return {"choices": choices, "id": "x", "object": "chat.completion.chunk"}


def text(index: int, written: str, end: str | None = None) -> dict[str, Any]:
    choice = {"index": index, "text": written, "logprobs": None, "finish_reason": end}
    return {"choices": [choice], "id": "x", "object": "text_completion"}


CHAT = (
    chat((0, {"role": "assistant", "content": None})),
    chat((1, {"role": "assistant", "content": None})),
    chat((0, {"reasoning_content": "é"})) | {"timings": told(5, 3, 1)["timings"]},
    chat((0, {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f"}}]})),
    chat((1, {"content": "ye"})),
    chat((1, {"content": "s"})),
    chat((1, {}), end="stop"),
    chat() | told(5, 3, 2),
    chat((0, {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]})),
    chat((0, {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]})),
    chat((0, {}), end="tool_calls"),
    chat() | told(5, 3, 4),
)
TEXT = (
    text(2, "x"),
    text(0, "a"),
    text(0, "b"),
    None,  # when it begins with the second prompt
    text(0, "", "length") | told(5, 0, 2),
    text(1, "", "stop") | told(5, 5, 1),
    text(3, "z"),
    text(3, "", "stop") | told(7, 0, 2),
    text(2, "y"),
    text(2, "", "length") | told(7, 2, 2),
)


def summed(data: bytes, cuts: list[int], choices: int, prompts: int) -> tuple[bytes, Any]:
    meters: Any = SimpleNamespace(**dict.fromkeys(("ttft", "itl"), SimpleNamespace(observe=print)))
    events = SummedEvents(0.0, meters, choices, prompts)
    pairs = zip([0, *cuts], [*cuts, len(data)], strict=True)
    return b"".join(events.feed(data[a:b], 1.0) for a, b in pairs), events


@pytest.mark.parametrize("seed", range(10))
def test_one_usage_at_the_end(seed: int) -> None:
    lot = random.Random(seed)
    for events, prompts, expected in ((CHAT, 1, (5, 6)), (TEXT, 2, (12, 7))):
        data = stream(*events)
        cuts = sorted(lot.sample(range(1, len(data)), 10))
        passed, found = summed(data, cuts, 2, prompts)
        assert found.usage() == expected
        assert found.ended
        left = [json.loads(e.removeprefix(b"data: ")) for e in passed.split(b"\n\n")[:-2]]
        usages = [event["usage"] for event in left if "usage" in event]
        assert usages == [left[-1]["usage"]]
        assert usages[0]["total_tokens"] == sum(expected)
        assert usages[0]["prompt_tokens_details"] == {"cached_tokens": 3 if prompts == 1 else 0}
        kept = [event["choices"] for event in events if event and event["choices"]]
        assert [event["choices"] for event in left if event["choices"]] == kept


def test_without_usage_the_timings_tell() -> None:
    """And nothing is changed: a client that did not ask for it gets none."""
    events = [
        {**CHAT[6], "timings": told(5, 3, 2)["timings"]},
        {**CHAT[10], "timings": told(5, 3, 4)["timings"]},
    ]
    passed, found = summed(stream(*events), [], 2, 1)
    assert passed == stream(*events)
    assert found.usage() == (5, 6)


def test_what_another_engine_says_of_all_choices_stays() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 6}
    data = stream(CHAT[4], CHAT[6], CHAT[10], chat() | {"usage": usage})
    passed, found = summed(data, [20], 2, 1)
    assert passed == data
    assert found.usage() == (5, 6)


def test_the_whole_answer() -> None:
    passed, _ = summed(stream(*CHAT), [], 2, 1)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    first = {"role": "assistant", "content": "", "reasoning_content": "é", "tool_calls": [call]}
    answer = assembled(passed)
    assert answer.pop("usage")["completion_tokens"] == 6
    assert answer == {
        "id": "x",
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": first, "finish_reason": "tool_calls"},
            {
                "index": 1,
                "message": {"role": "assistant", "content": "yes"},
                "finish_reason": "stop",
            },
        ],
    }
    passed, _ = summed(stream(*TEXT), [], 2, 2)
    texts = [choice["text"] for choice in assembled(passed)["choices"]]
    assert texts == ["ab", "", "xy", "z"]


def test_a_fault_within_the_stream_is_the_answer() -> None:
    error = {"error": {"code": 500, "message": "Compute error."}}
    assert assembled(stream(CHAT[0], error)) == error
