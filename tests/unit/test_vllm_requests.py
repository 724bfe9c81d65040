"""What vLLM is asked for: the same numbers as a slow loop, and no more computed than need be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from quantkit.engines.vllm.requests import Answer, Question, Request, questions
from tests.fake_vllm import likeliest, log_probs

Ids = tuple[int, ...]


class _Server:
    """Answers as vLLM does, and counts the tokens that it would compute with its prefix cache."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.cached: set[Ids] = set()
        self.computed = 0

    def ask(self, request: Request) -> Answer:
        prompt = request.prompt
        ends = range(self.block, len(prompt), self.block)  # the last token is computed always
        known = 0
        if not request.inside:
            while known + self.block in ends and prompt[: known + self.block] in self.cached:
                known += self.block
        self.computed += len(prompt) - known
        self.cached |= {prompt[:end] for end in (*ends, len(prompt)) if end % self.block == 0}
        following = log_probs(prompt)
        named = {likeliest(prompt), *request.ids}
        choice: dict[str, Any] = {
            "logprobs": {"top_logprobs": [{f"token_id:{t}": following[t] for t in named}]},
            "prompt_logprobs": None,
        }
        if request.inside:
            choice["prompt_logprobs"] = [None]
            for at in range(1, len(prompt)):
                there = log_probs(prompt[:at])
                tokens = {prompt[at], there.index(max(there))}
                choice["prompt_logprobs"].append({str(t): {"logprob": there[t]} for t in tokens})
        return Answer.of(request, choice)


def _check(
    sequences: Sequence[Ids], first: Sequence[int], block: int
) -> tuple[_Server, list[Question]]:
    """Every token of every sequence against the model itself."""
    server, asked = _Server(block), list(questions(sequences, first, block))
    found = [
        scores
        for question in asked
        for scores in question.scores([server.ask(request) for request in question.requests])
    ]
    assert len(found) == len(sequences)
    for scores, sequence, start in zip(found, sequences, first, strict=True):
        rows = [log_probs(sequence[:at]) for at in range(start, len(sequence))]
        expected = [row[sequence[start + i]] for i, row in enumerate(rows)]
        torch.testing.assert_close(scores.log_probs, torch.tensor(expected))
        tops = [likeliest(sequence[:at]) for at in range(start, len(sequence))]
        assert scores.is_top.tolist() == [
            top == token for top, token in zip(tops, sequence[start:], strict=True)
        ]
    return server, asked


def _drawn(rng: random.Random, count: int) -> Ids:
    return tuple(rng.randrange(30) for _ in range(count))


def test_choices_of_several_tokens_compute_their_context_once() -> None:
    """100 tokens, and three choices that begin alike: one request for each beginning."""
    context = _drawn(random.Random(0), 100)
    choices = [(8, 9, 10), (8, 9, 11), (7, 9)]
    server, (question,) = _check([context + end for end in choices], [100] * 3, block=16)
    assert [(r.prompt[100:], r.ids, r.inside) for r in question.requests] == [
        ((), (8, 7), 0), ((8,), (9,), 0), ((8, 9), (10, 11), 0), ((7,), (9,), 0),
    ]  # fmt: skip
    # 96 tokens are whole blocks.
    assert server.computed == 100 + 5 + 6 + 5
    # The other way: each choice with its whole context, but for the two that end alike.
    assert server.computed < 102 + 101


def test_choices_of_one_token_are_one_request() -> None:
    context = _drawn(random.Random(0), 50)
    _, (question,) = _check([(*context, last) for last in range(4)], [50] * 4, block=16)
    assert question.requests == (Request(context, (0, 1, 2, 3)),)


def test_a_text_is_one_request_and_long_choices_after_a_short_context_are_one_each() -> None:
    rng = random.Random(0)
    text = _drawn(rng, 60)
    _, (question,) = _check([text], [1], block=16)
    assert question.requests == (Request(text[:-1], text[-1:], 1),)
    context = _drawn(rng, 10)
    endings = [context + _drawn(rng, 20) for _ in range(4)]
    server, (question,) = _check(endings, [10] * 4, block=16)
    assert [request.inside for request in question.requests] == [10] * 4
    assert server.computed == 4 * 29


@pytest.mark.parametrize("block", [1, 4, 16, 128])
def test_any_mixture_against_a_slow_loop(block: int) -> None:
    """Contexts of any length with choices of any, repeated ones too, in any order."""
    rng = random.Random(block)
    sequences: list[Ids] = []
    first = []
    for _ in range(60):
        context = _drawn(rng, rng.randint(1, 60))
        for _ in range(rng.randint(1, 4)):
            sequences.append(context + _drawn(rng, rng.choice((1, 1, 2, 5))))
            first.append(len(context))
            if rng.random() < 0.2:
                sequences.append(sequences[-1])
                first.append(first[-1])
    server, asked = _check(sequences, first, block)
    assert sum(len(q.sequences) for q in asked) == len(sequences)
    ways = {request.inside > 0 for question in asked for request in question.requests}
    assert ways == ({False} if block == 1 else {False, True})
    # Never more than if each sequence were asked for by itself.
    assert server.computed <= sum(len(sequence) - 1 for sequence in sequences)


def test_no_request_asks_for_more_ids_than_vllm_takes() -> None:
    sequences = [(1, 2, i) for i in range(31)] * 9
    asked = list(questions(sequences, [2] * len(sequences), 16))
    assert [len(question.sequences) for question in asked] == [128, 128, 23]
    assert all(len(request.ids) <= 31 for question in asked for request in question.requests)
