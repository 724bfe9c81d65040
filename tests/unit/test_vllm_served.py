"""The client of vLLM's server, against a server in vLLM's words whose model can be recomputed."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from quantkit.engines.base import LanguageModel, Scorer
from quantkit.engines.server import ServerCommand
from quantkit.engines.vllm.served import started
from quantkit.errors import EngineError
from quantkit.models.variant import Variant
from tests.fake_vllm import POISON, likeliest, log_probs


class _InProcess(Scorer):
    """The same model without a server."""

    def logits(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        for ids, start in zip(sequences, first, strict=True):
            yield torch.tensor([log_probs(ids[: at + 1]) for at in range(start, len(ids))])


BLOCK = 4


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))


@contextmanager
def _served(tmp_path: Path, program: str = "tests.fake_vllm") -> Iterator[LanguageModel]:
    def command(port: int, key: str, name: str) -> ServerCommand:
        assert name
        argv = (sys.executable, "-m", program, str(port), key, str(tmp_path / "written"))
        return ServerCommand(argv)

    variant = Variant("v", tmp_path, "gptq", "w4g64", None)
    with started(variant, command, 40, 3, BLOCK) as model:
        yield model


def _sequences() -> tuple[list[list[int]], list[int]]:
    """Questions with choices of one token and of several, and texts that share nothing."""
    drawn = random.Random(1)
    texts = [[drawn.randrange(30) for _ in range(20)] for _ in range(7)]
    ends = [sorted({1, 2, 3, likeliest(text)}) for text in texts[:3]]
    one = [[*text, last] for text, lasts in zip(texts, ends, strict=False) for last in lasts]
    several = [[*text, 5, 6, last] for text in texts[3:5] for last in (1, 2)]
    return [*one, *several, *texts[5:]], [20] * len(one + several) + [1, 7]


def test_likelihoods_are_those_of_the_logits(tmp_path: Path) -> None:
    sequences, first = _sequences()
    expected = list(_InProcess().likelihoods(sequences, first))
    with _served(tmp_path) as model:
        found = list(model.likelihoods(sequences, first))
    assert any(bool(scores.is_top.any()) for scores in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.log_probs, theirs.log_probs)
        assert torch.equal(ours.is_top, theirs.is_top)


def test_answers_end_where_the_caller_says_and_cost_no_more(tmp_path: Path) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(8)]

    def greedy(prompt: list[int]) -> list[int]:
        ids = list(prompt)
        while len(ids) - len(prompt) < 30 and (ids == prompt or ids[-1] >= 8):
            ids.append(likeliest(ids))
        return ids[len(prompt) :]

    with _served(tmp_path) as model:
        found = list(model.generate(prompts, 30, lambda answer: answer[-1] < 8))
        assert list(model.generate(prompts[:2], 0, lambda _: False)) == [[], []]
        whole = list(model.generate(prompts[:1], 5, lambda _: False))
    assert found == [greedy(prompt) for prompt in prompts]
    assert min(map(len, found)) < 5
    assert len(whole[0]) == 5
    # The others were broken off.
    assert str(prompts[0]) in (tmp_path / "written").read_text()


def test_what_a_server_refuses_is_one_line(tmp_path: Path) -> None:
    with _served(tmp_path) as model:
        with pytest.raises(EngineError, match=r"vllm refused a request: 400 no such token$"):
            list(model.likelihoods([[1, 2], [POISON, 1, 2]], [1, 1]))
        with pytest.raises(EngineError, match=r"vllm broke off: the engine died$"):
            list(model.generate([[POISON, POISON]], 9, lambda _: False))
        with pytest.raises(EngineError, match="sequence of 41 tokens"):
            list(model.likelihoods([[1] * 42], [1]))
        with pytest.raises(EngineError, match="do not fit in the 40"):
            list(model.generate([[1] * 35], 6, lambda _: False))


def test_a_server_that_dies_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with _served(tmp_path) as model:
        family = psutil.Process().children(recursive=True)
        (server,) = (p for p in family if p.cmdline()[1:3] == ["-m", "tests.fake_vllm"])
        server.kill()
        with pytest.raises(EngineError, match="vllm did not answer a request"):
            list(model.likelihoods([[1, 2, 3]], [1]))
    assert not any(process.is_running() for process in family)


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="before it was ready"), _served(tmp_path, "no_such"):
        raise AssertionError("it started")
