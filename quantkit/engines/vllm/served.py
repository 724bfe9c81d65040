"""A model in vLLM's server, asked for the likelihoods of given tokens and for greedy answers.

Over ``/v1/completions``, in token ids; what is asked in which request: ``requests.py``.
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

from __future__ import annotations

import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from quantkit.engines import greedy
from quantkit.engines.base import LanguageModel, TokenScores
from quantkit.engines.process import free_port, launched
from quantkit.engines.server import ServerCommand
from quantkit.engines.vllm.completions import HOST, Completions
from quantkit.engines.vllm.requests import Answer, Request, questions
from quantkit.errors import EngineError
from quantkit.models.variant import Model
from quantkit.system.home import home
from quantkit.system.progress import say

T = TypeVar("T")

_NAME = "model"
_GREEDY = {"temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True}
"""Said in full: vLLM takes what is left out from the model's generation_config.json."""


@contextmanager
def started(
    model: Model,
    command: Callable[[int, str, str], ServerCommand],
    context: int,
    slots: int,
    block: int,
) -> Iterator[LanguageModel]:
    """The model in a server of its own while the block runs.

    ``command``: of the port, the key and the model's name; it must allow one token more than
    ``context``, and ``slots`` requests at the same time.
    """
    port, key = free_port(HOST), secrets.token_hex(16)
    wanted = command(port, key, _NAME)
    logs = home() / "logs" / "evaluate"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / (re.sub(r"[^\w.-]+", "-", model.id) + "-vllm.log")
    say(f"{model.id}: starting vllm")
    with launched("vllm", wanted.argv, wanted.env, log) as process:
        seconds = process.wait_ready(HOST, port, wanted)
        say(f"{model.id}: vllm ready after {seconds:.0f} s")
        yield ServedModel(model, Completions(process, port, key, _NAME), context, slots, block)


class ServedModel(LanguageModel):
    """A model in a running server, which is asked for sequences of up to ``context`` tokens.

    ``slots`` requests at the same time. ``block``: tokens of a block of the server's prefix cache.
    """

    def __init__(
        self, model: Model, completions: Completions, context: int, slots: int, block: int
    ) -> None:
        self._model = model
        self._completions = completions
        self._context = context
        self._slots = slots
        self._block = block

    def likelihoods(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[TokenScores]:
        """See ``LanguageModel.likelihoods``."""
        longest = max((len(sequence) - 1 for sequence in sequences), default=0)
        if longest > self._context:
            raise EngineError(
                f"vllm: a sequence of {longest} tokens and the one that follows; the model was "
                f"opened for {self._context} ({self._model.path})"
            )
        asked = list(questions(sequences, first, self._block))
        answers = self._side_by_side(self._ask, [one for q in asked for one in q.requests])
        for question in asked:
            yield from question.scores([next(answers) for _ in question.requests])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        ends: Callable[[Sequence[int]], bool],
    ) -> Iterator[list[int]]:
        """See ``LanguageModel.generate``: streamed, so that an answer can end at any token."""
        greedy.check_lengths("vllm", prompts, max_tokens, self._context)
        return self._side_by_side(partial(self._write, max_tokens, ends), prompts)

    def _ask(self, request: Request) -> Answer:
        answer = self._completions.ask(
            _GREEDY
            | {
                "prompt": request.prompt,
                "max_tokens": 1,
                "logprobs": len(request.ids),
                "logprob_token_ids": request.ids,
                "return_tokens_as_token_ids": True,
                # One beside the token itself: the likeliest there.
                "prompt_logprobs": 1 if request.inside else None,
            }
        )
        try:
            return Answer.of(request, answer["choices"][0])
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(
                f"vllm answered without the log-probabilities that it was asked for ({error!r}); "
                "`quantkit engines install vllm` installs the version that gives them"
            ) from error

    def _write(
        self, max_tokens: int, ends: Callable[[Sequence[int]], bool], prompt: Sequence[int]
    ) -> list[int]:
        answer: list[int] = []
        if max_tokens < 1:
            return answer
        wanted = {"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True}
        with self._completions.stream(_GREEDY | wanted) as parts:
            for part in parts:
                for token in part["choices"][0].get("token_ids") or ():
                    answer.append(token)
                    if ends(answer):
                        return answer
        return answer

    def _side_by_side(self, ask: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
        """``ask(item)`` of each item in order, ``slots`` at a time and not much further ahead."""
        waiting: deque[Future[T]] = deque()
        with ThreadPoolExecutor(self._slots) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(ask, item))
                    if len(waiting) > 2 * self._slots:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
