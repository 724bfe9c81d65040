"""Full logits from llama.cpp, in this process, through llama-cpp-python's low-level functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import llama_cpp

from quantkit.engines import greedy
from quantkit.engines.base import Scorer, check_context
from quantkit.engines.llamacpp import shared
from quantkit.engines.llamacpp.context import (
    MAX_SEQUENCES,
    UBATCH,
    Context,
    Token,
    error,
    listen,
)
from quantkit.engines.llamacpp.kv_cache import DEFAULT
from quantkit.engines.llamacpp.session import Session
from quantkit.engines.prefixes import runs
from quantkit.errors import EngineError
from quantkit.models.variant import Model

if TYPE_CHECKING:
    import torch

_PROMPTS = 8
"""Answered at the same time."""
_TOKENS_ANSWERED = 8192
"""Tokens of these prompts and their answers together, which bounds their KV cache."""


class LlamaScorer(Scorer):
    """A GGUF file in llama.cpp with its default settings, loaded within ``with``; ``kv_cache``: the
    type of its keys and values.

    Short sequences are computed several at a time, each as a sequence of its own in one batch.
    """

    def __init__(self, model: Model, context: int, kv_cache: str = DEFAULT) -> None:
        self._path = model.weights
        self._kv_cache = kv_cache
        # Whole units of computation: what is left of one would only be computed less efficiently.
        self._capacity = -(-context // UBATCH) * UBATCH
        self._model: Any = None
        self._contexts: list[Context] = []

    def __enter__(self) -> LlamaScorer:
        listen()
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            os.fsencode(self._path), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise error("cannot load the model", self._path)
        # Such a context must not be larger than it was asked for.
        self._scaled = shared.scaled_by_length(self._model)
        self._shareable = not self._scaled and shared.shareable(self._model)
        try:
            # A step beside the longest sequence.
            spare = UBATCH if self._shareable else 0
            self._context = self._open(self._capacity + spare)
        except EngineError:
            self._free()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._free()

    def logits(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """See ``Scorer.logits``: the output layer runs at the positions asked for only."""
        check_context("llamacpp", sequences, self._capacity, self._path)
        for run in runs(sequences):
            some, starts = sequences[run.start : run.stop], first[run.start : run.stop]
            if run.shared and self._shareable:
                yield from shared.compute(self._context, some, starts)
            else:
                yield from self._side_by_side(some, starts)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        ends: Callable[[Sequence[int]], bool],
    ) -> Iterator[list[int]]:
        """See ``LanguageModel.generate``."""
        greedy.check_lengths("llamacpp", prompts, max_tokens, self._capacity)
        room = self._capacity if self._scaled else max(_TOKENS_ANSWERED, self._capacity)
        groups = list(greedy.batches(prompts, max_tokens, _PROMPTS, room))
        needed = max((sum(map(len, g)) + max_tokens * len(g) for g in groups), default=0)
        cells = max(self._capacity, -(-needed // UBATCH) * UBATCH)
        context = self._open(cells)
        try:
            for group in groups:
                session = Session(context, share=self._shareable)
                yield from greedy.write(session, group, max_tokens, ends)
        finally:
            if context in self._contexts:
                self._contexts.remove(context)
                context.close()

    def _side_by_side(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        for batch in self._batches(sequences):
            self._context.clear()
            rows = self._context.decode(
                Token(token, at, [number], at >= first[i])
                for number, i in enumerate(batch)
                for at, token in enumerate(sequences[i])
            )
            done = 0
            for i in batch:
                count = len(sequences[i]) - first[i]
                yield rows[done : done + count]
                done += count

    def _batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of neighbours that fit in the context together."""
        batch: list[int] = []
        tokens = 0
        for i, sequence in enumerate(sequences):
            if batch and (tokens + len(sequence) > self._capacity or len(batch) == MAX_SEQUENCES):
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += len(sequence)
        if batch:
            yield batch

    def _open(self, cells: int) -> Context:
        self._contexts.append(Context(self._model, self._path, cells, self._kv_cache))
        return self._contexts[-1]

    def _free(self) -> None:
        for context in self._contexts:
            context.close()
        self._contexts.clear()
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._model = None
