"""Requests that a client may send and an engine may trip over: each must be answered or refused.

``python -m tests.integration.odd_requests URL MODEL [KEY]`` sends them to any server and prints
what comes back.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
USER = {"role": "user", "content": "x"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)
ODD: dict[str, Any] = {
    "null": None,
    "text": "x",
    "number": -1,
    "huge": 2**63,
    "list of null": [None],
    "nested": [[[["x"]]]],
    "object": {},
    "odd object": {"": None, "x": [{}]},
}
"""Values of every kind, for every field."""
FIELDS = {
    CHAT: (
        "messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "functions",
        "reasoning_effort", "chat_template_kwargs", "continue_final_message", "top_logprobs",
    ),
    COMPLETIONS: ("prompt", "best_of", "echo", "suffix"),
    TOKENIZE: ("content", "prompt", "add_special", "with_pieces"),
}  # fmt: skip
SHARED = (
    "n", "stop", "stream", "stream_options", "logprobs", "logit_bias", "max_tokens", "temperature",
    "top_p", "seed", "frequency_penalty", "user", "metadata", "min_p", "response_fields", "grammar",
    "json_schema", "samplers",
)  # fmt: skip


@dataclass(frozen=True)
class Odd:
    path: str
    body: bytes


def requests(model: str) -> Iterator[tuple[str, Odd]]:
    """By what is odd about them."""
    short = {"max_tokens": 2, "stop": ["e", "a", "t", " "]}
    usual: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [USER], **short},
        COMPLETIONS: {"prompt": "x", **short},
        TOKENIZE: {"content": "x", "prompt": "x"},
    }

    def asking(path: str, **odd: Any) -> Odd:
        return Odd(path, json.dumps({"model": model, **usual[path], **odd}).encode())

    for path, own in FIELDS.items():
        for field in (*own, *(SHARED if path != TOKENIZE else ())):
            for name, value in ODD.items():
                yield f"{path} {field} {name}", asking(path, **{field: value})
    for name, messages in _messages():
        yield f"message: {name}", asking(CHAT, messages=messages)
    for name, extra in _fields():
        for path in (CHAT, COMPLETIONS):
            yield f"{path}: {name}", asking(path, **extra)
    for name, prompt in _prompts():
        yield f"prompt: {name}", asking(COMPLETIONS, prompt=prompt)
        yield f"tokenize: {name}", asking(TOKENIZE, prompt=prompt, content=prompt)
    for path in usual:
        plain = asking(path).body
        for name, body in _bodies(plain):
            yield f"{path} {name}", Odd(path, body)


def _messages() -> Iterator[tuple[str, Any]]:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    for name, value in ODD.items():
        yield f"is {name}", [value]
        for key in ("role", "content", "name", "tool_calls", "reasoning_content", "refusal"):
            yield f"{key} {name}", [USER | {key: value}]
            yield f"assistant's {key} {name}", [USER, {**called, key: value}]
        for key in ("id", "type", "function"):
            yield f"call {key} {name}", [USER, called | {"tool_calls": [CALL | {key: value}]}]
        for key in ("name", "arguments"):
            function = CALL["function"] | {key: value}  # type: ignore[operator]
            yield (
                f"function {key} {name}",
                [USER, called | {"tool_calls": [CALL | {"function": function}]}],
            )
        yield f"tool_call_id {name}", [USER, called, {"role": "tool", "tool_call_id": value}]
        answer = {"role": "tool", "content": value, "tool_call_id": "1"}
        yield f"tool's content {name}", [USER, called, answer]
        for key in ("type", "text"):
            part = {"type": "text", "text": "x", key: value}
            yield f"part {key} {name}", [{"role": "user", "content": [part]}]
        part = {"type": "image_url", "image_url": {"url": value}}
        yield f"image {name}", [{"role": "user", "content": [part]}]
    for name, part in {
        "image": {"type": "image_url", "image_url": {"url": PIXEL}},
        "image elsewhere": {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}},
        "image in a file": {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        "image without url": {"type": "image_url"},
        "input_image": {"type": "input_image", "image_url": PIXEL},
        "audio": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        "video": {"type": "video_url", "video_url": {"url": "http://127.0.0.1:9/a.mp4"}},
        "file": {"type": "file", "file": {"file_id": "x"}},
        "refusal": {"type": "refusal", "refusal": "no"},
        "marker": {"type": "media_marker", "text": "<__media__>"},
        "untyped": {"text": "x"},
    }.items():
        yield f"part {name}", [{"role": "user", "content": [part]}]
    yield "no role", [{"content": "x"}]
    yield "no content", [{"role": "user"}]
    yield "assistant with nothing", [USER, {"role": "assistant"}]
    yield "as a client returns it", [
        USER,
        {
            "role": "assistant", "content": None, "refusal": None, "annotations": None,
            "audio": None, "function_call": None, "tool_calls": None, "reasoning_content": None,
        },
        USER,
    ]  # fmt: skip
    yield "two answers at the end", [USER, *[{"role": "assistant", "content": "x"}] * 2]
    yield "a call at the end", [USER, called]
    yield "unknown role", [{"role": "wizard", "content": "x"}]
    yield "template as content", [{"role": "user", "content": "{{ 1 / 0 }}{% for %}"}]
    yield "NUL", [{"role": "user", "content": "a\0b"}]
    yield "thousand messages", [USER] * 1000


def _fields() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "tools without name", {"tools": [{"type": "function", "function": {}}]}
    yield "tools without function", {"tools": [{"type": "function"}]}
    yield "tools with null", {"tools": [TOOL | {"function": {"name": "f", "parameters": None}}]}
    yield "tools with bad schema", {"tools": [_tool({"type": "wizard"})]}
    yield "tools with a reference to nothing", {"tools": [_tool({"$ref": "#/x/y"})]}
    yield "tools with a circle", {"tools": [_tool({"$ref": "#"})]}
    yield "tool_choice of nothing", {"tools": [TOOL], "tool_choice": "required", "grammar": "x"}
    yield (
        "tool_choice unknown",
        {
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
    )
    yield "tools and grammar", {"tools": [TOOL], "grammar": 'root ::= "a"'}
    yield "tools and logprobs", {"tools": [TOOL], "logprobs": True, "stream": True}
    for name, schema in {
        "null": None,
        "pattern": {"type": "string", "pattern": "("},
        "reference": {"$ref": "https://127.0.0.1:9/x.json"},
        "type": {"type": ["string", None]},
        "negative": {"type": "array", "minItems": -1},
        "huge": {"type": "string", "minLength": 10**9},
        "list": [],
        "true": True,
    }.items():
        wrapped = {"name": "x", "schema": schema}
        yield f"schema {name}", {"response_format": {"type": "json_schema", "json_schema": wrapped}}
        yield (
            f"object schema {name}",
            {"response_format": {"type": "json_object", "schema": schema}},
        )
    yield "response_format unknown", {"response_format": {"type": "wizard"}}
    yield "response_format empty", {"response_format": {"type": "json_schema"}}
    yield "grammar broken", {"grammar": "root ::= ("}
    yield "grammar recursive", {"grammar": "root ::= root"}
    yield "logit_bias names", {"logit_bias": {"x": 1, "": 2, "-5": 3, "99999999999": 4}}
    yield "logit_bias values", {"logit_bias": {"1": None, "2": "x", "3": [], "4": 1e308}}
    yield "logit_bias pairs", {"logit_bias": [[1], [1, 2, 3], ["x", True], None]}
    yield "stop of many", {"stop": ["a"] * 1000}
    yield "stop mixed", {"stop": ["a", 1, None, ""]}
    yield "top_logprobs alone", {"top_logprobs": 5}
    yield "top_logprobs huge", {"logprobs": True, "top_logprobs": 10**6}
    yield "logprobs huge", {"logprobs": 10**6}
    yield "stream_options alone", {"stream_options": {"include_usage": True}}
    yield "stream_options odd", {"stream": True, "stream_options": {"include_usage": "x"}}
    yield "n of many", {"n": 10**6}
    yield "best_of", {"n": 2, "best_of": 1}
    yield "id_slot", {"id_slot": 10**6}
    yield "lora", {"lora": [{"id": 5, "scale": 1}]}
    yield "negative temperature", {"temperature": -1}
    yield "samplers unknown", {"samplers": ["wizard"]}
    yield "mirostat", {"mirostat": 3}
    yield "endless number", {"metadata": 10**400}
    yield "deep", {"metadata": _deep(150)}


def _tool(parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def _prompts() -> Iterator[tuple[str, Any]]:
    yield "unknown token", [10**6]
    yield "negative token", [-1]
    yield "fraction of a token", [1.5]
    yield "mixed", [1, "x"]
    yield "with null", ["x", None]
    yield "lists", [[1, 2], ["x"]]
    yield "empty lists", [[], []]
    yield "object", {"prompt_string": "x", "multimodal_data": ["AAAA"]}
    yield "huge token", [2**40]
    yield "empty", ""
    yield "NUL", "a\0b"
    yield "long", "x " * 10_000


def _bodies(plain: bytes) -> Iterator[tuple[str, bytes]]:
    text = plain.decode()
    text = text[:-1] + ', "user": "é"}'
    yield "UTF-16", text.encode("utf-16")
    yield "UTF-16, big end first", text.encode("utf-16-be")
    yield "UTF-32", text.encode("utf-32")
    yield "Latin-1", text.encode("latin-1")
    yield "with a signature", text.encode("utf-8-sig")
    yield "key twice", (text[:-1] + ', "model": 1, "max_tokens": "x"}').encode()
    yield "nested", (text[:-1] + ', "x": ' + "[" * 900 + "]" * 900 + "}").encode()
    yield "nested deeply", (text[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}").encode()
    for odd in (r'"\ud800"', r'"\udc00\ud800"', "NaN", "-Infinity", "1e999", "-1e999", "01", "'x'"):
        for key in ("user", "temperature", "messages", "prompt", "content", "x"):
            value = odd if key != "messages" else f'[{{"role": "user", "content": {odd}}}]'
            yield f"{odd} in {key}", (text[:-1] + f', "{key}": {value}}}').encode()
    yield "half of a pair, in bytes", text.encode().replace("é".encode(), b"\xed\xa0\x80")
    yield "too long a form, in bytes", text.encode().replace("é".encode(), b"\xc0\x80")
    yield "a key of half a pair", (text[:-1] + r', "\ud800": 1}').encode()
    yield "list", b"[" + plain + b"]"
    yield "text", b'"x"'
    yield "null", b"null"
    yield "nothing", b""
    yield "and more", plain + b"x"


def _deep(levels: int) -> Any:
    value: Any = None
    for _ in range(levels):
        value = {"x": value}
    return value


def is_refusal(answer: httpx.Response) -> bool:
    """Whether it is an error in the shape of OpenAI's API."""
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(error["message"], str) and isinstance(error["type"], str)


def main(url: str, model: str, key: str = "") -> None:
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:
        for name, odd in requests(model):
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            try:
                answer = http.post(odd.path, content=odd.body, headers=headers)
            except httpx.HTTPError as error:
                print(f"DIED {name}: {error!r}")
                statuses[0] += 1
                continue
            statuses[answer.status_code] += 1
            if answer.status_code >= 500 or (answer.status_code >= 400 and not is_refusal(answer)):
                print(f"{answer.status_code} {name}: {answer.text[:200]}")
    print(dict(statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
