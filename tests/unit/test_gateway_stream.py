from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from quantkit.gateway.body import Body
from quantkit.gateway.config import GatewayConfig
from quantkit.gateway.metrics import _Relabelled
from quantkit.gateway.routing import Router, prompt_characters
from quantkit.gateway.stream import Events, usage


class Seen(list[float]):
    """A histogram that keeps all that it is told."""

    def observe(self, value: float) -> None:
        self.append(value)


def events(began: float = 0.0) -> tuple[Events, Any]:
    meters = SimpleNamespace(ttft=Seen(), itl=Seen())
    return Events(began, meters), meters  # type: ignore[arg-type]


STREAM = (
    b': ping\n\ndata: {"t": "a\\n\\ndata: b"}\n\ndata: {"usage": null}\n\n'
    b'data: {"usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_gives_the_same_whole_events(seed: int) -> None:
    lot = random.Random(seed)
    found, meters = events()
    cuts = sorted(lot.sample(range(1, len(STREAM)), lot.randrange(0, 30)))
    passed = [
        found.feed(STREAM[start:end], float(number))
        for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(STREAM)], strict=True), 1)
    ]
    assert b"".join(passed) == STREAM
    assert all(part.endswith(b"\n\n") for part in passed if part)
    assert found.count == 3
    assert found.ended
    assert found.usage() == (5, 3)
    assert len(meters.ttft) == 1
    assert len(meters.itl) == 2


def test_times() -> None:
    found, meters = events(began=10.0)
    for now, data in ((10.5, b"data: 1\n\n"), (10.7, b"data: 2\n\ndata: 3\n\n"), (11, b"data")):
        found.feed(data, now)
    assert meters.ttft == [0.5]
    assert meters.itl == pytest.approx([0.1, 0.1])
    assert found.usage() == (0, 3)
    assert not found.ended


@pytest.mark.parametrize(
    ("end", "ended", "failed"),
    [
        (b"", False, False),
        (b"data: [DONE]\n\n", True, False),
        (b'data: {"error": {"code": 500}}\n\n', True, True),
        (b'data: {"error": {"code": 500}}\r\n\r\ndata: [DONE]\r\n\r\n', True, True),
        (b'data: {"text": "a \\"error\\""}\n\ndata: [DONE]\n\n', True, False),
    ],
)
def test_how_a_stream_ended(end: bytes, ended: bool, failed: bool) -> None:
    found, _ = events()
    for number, data in enumerate((b'data: {"text": "x"}\n\n', end)):
        found.feed(data, float(number))
    assert (found.ended, found.failed) == (ended, failed)


def test_tokens_that_an_answer_tells() -> None:
    assert usage({"usage": {"prompt_tokens": 1, "completion_tokens": 2}}) == (1, 2)
    timings = {"prompt_n": 3, "cache_n": 5, "predicted_n": 4}
    assert usage({"usage": None, "timings": timings}) == (8, 4)
    assert usage({"usage": {"prompt_tokens": "x"}}) is None
    assert usage([]) is None


@pytest.mark.parametrize(
    ("content", "length"),
    [
        ({"prompt": "abc"}, 3),
        ({"prompt": ["ab", "c"]}, 3),
        ({"prompt": [1, 2, 3]}, 12),
        ({"prompt": [[1], [2]]}, 8),
        ({"messages": [{"content": "ab"}, {"content": [{"type": "text", "text": "c"}]}]}, 3),
        ({"messages": [{"content": None}, "x"]}, 0),
        ({"prompt": {"a": 1}}, 0),
        ({}, 0),
    ],
)
def test_length_of_prompts(content: dict[str, Any], length: int) -> None:
    assert prompt_characters(content) == length


def test_renaming_keeps_the_rest() -> None:
    raw = '{"model": "a", "x": [1, 2.50, "ü\\ud83d\\ude00"], "y": 123456789012345678901234567890}'
    body = Body.parse(raw.encode())
    assert body.naming("a") is body.raw
    renamed = Body.parse(body.naming("b"))
    assert renamed.content == body.content | {"model": "b"}


def test_metrics_of_engines_get_our_labels() -> None:
    """One family of two engines, and a label of theirs that has the name of one of ours."""
    text = (
        "# HELP vllm:x_total What.\n# TYPE vllm:x_total counter\n"
        'vllm:x_total{engine="0",finished="a,engine=\\"b\\""} 2\n'
        "# TYPE plain gauge\nplain 1.5\n"
    )
    engines = [SimpleNamespace(name=name, engine="vllm") for name in ("one", "two")]
    found = list(_Relabelled([(e, text) for e in engines]).collect())  # type: ignore[misc]
    assert [metric.name for metric in found] == ["vllm:x", "plain"]
    samples = found[0].samples
    assert [sample.labels["backend"] for sample in samples] == ["one", "two"]
    assert samples[0].labels["engine"] == "vllm"
    assert samples[0].labels["exported_engine"] == "0"
    assert samples[0].labels["finished"] == 'a,engine="b"'
    assert list(_Relabelled([(engines[0], "}{ not metrics")]).collect()) == []  # type: ignore[list-item]


def test_rules_by_load() -> None:
    """More than two running go to the less busy of the two others, and come back."""
    config = GatewayConfig.model_validate(
        {
            "backends": {name: {"url": f"http://{name}"} for name in "abc"},
            "models": {"m": [{"running_over": 2, "backend": ["a", "b"]}, {"backend": "c"}]},
        }
    )
    loads = {"a": (False, 0.9), "b": (False, 0.2), "c": (False, 0.0)}
    backends: Any = {name: SimpleNamespace(name=name, load=load) for name, load in loads.items()}
    router = Router(config, backends)
    body = Body.parse(b'{"model": "m"}')

    def chosen() -> list[str]:
        return [backend.name for backend in router.candidates("m", body, None)]

    router.running("m", 2)
    assert chosen() == ["c"]
    router.running("m", 1)
    assert chosen() == ["b", "a"]
    backends["b"].load = (True, 0.0)  # not reached just now
    assert chosen() == ["a", "b"]
    router.running("m", -1)
    assert chosen() == ["c"]
