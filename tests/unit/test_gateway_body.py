from __future__ import annotations

import json

import pytest

from quantkit.gateway.answers import ApiError
from quantkit.gateway.body import Body


@pytest.mark.parametrize(
    "body",
    [
        '{"model": "é"}'.encode("utf-16"),
        '{"model": "é"}'.encode("utf-16-be"),
        '{"model": "é"}'.encode("utf-32"),
        '{"model": "é"}'.encode("latin-1"),
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": "\xc0\x80"}',
        rb'{"model": "\ud800"}',
        rb'{"model": "\udc00\ud800"}',
        rb'{"\ud800": 1}',
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"x": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"x": ' + b"9" * 5000 + b"}",
        b'{"x": 1} {}',
        b"",
        b'["model"]',
        b'"model"',
    ],
)
def test_what_is_no_json_for_every_engine(body: bytes) -> None:
    """Python's own reader takes most of these; llama-server or vLLM does not."""
    with pytest.raises(ApiError) as refused:
        Body.parse(body)
    error = json.loads(refused.value.body())["error"]
    assert refused.value.status == error["code"] == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None


def test_a_signature_is_taken_off() -> None:
    """As RFC 8259 allows; not every engine would do it."""
    assert Body.parse('{"model": "m"}'.encode("utf-8-sig")).raw == b'{"model": "m"}'


@pytest.mark.parametrize(
    ("content", "prompts", "choices"),
    [
        ({"messages": []}, 1, 1),
        ({"messages": [], "n": 3}, 1, 3),
        ({"prompt": "x", "n": None}, 1, 1),
        ({"prompt": ["x", "y"], "n": 2}, 2, 2),
        ({"prompt": [1, 2]}, 1, 1),
        ({"prompt": [1, "x"], "n_cmpl": 2, "n": 5}, 1, 2),
        ({"prompt": [[1, 2], [3]]}, 2, 1),
        ({"prompt": [], "n": 0}, 1, 1),
        ({"prompt": {}, "n": "2"}, 1, 1),
        ({"n": 2.5}, 1, 1),
        ({"n": -4}, 1, 1),
    ],
)
def test_how_many_answers_are_asked_for(
    content: dict[str, object], prompts: int, choices: int
) -> None:
    body = Body.parse(json.dumps(content).encode())
    assert (body.prompts, body.choices, body.answers) == (prompts, choices, prompts * choices)
