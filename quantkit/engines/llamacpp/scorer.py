"""Full logits from llama.cpp, in this process, through llama-cpp-python's low-level functions."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from quantkit.engines.base import Scorer
from quantkit.errors import EngineError
from quantkit.variant import Model

if TYPE_CHECKING:
    import torch

_UBATCH = 512
"""Tokens that llama.cpp computes together; ``llama-perplexity``'s default, so numbers are its."""
_MAX_SEQUENCES = 64
_LOG_ERROR, _LOG_CONTINUES = 4, 5
"""``GGML_LOG_LEVEL_ERROR`` and ``GGML_LOG_LEVEL_CONT`` of ggml.h."""

_errors: list[str] = []
_last_level = 0


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_errors(level: int, text: bytes, _: Any) -> None:
    """Drop llama.cpp's log but for its errors, which go into our own message."""
    global _last_level
    if level != _LOG_CONTINUES:
        _last_level = level
    if _last_level == _LOG_ERROR:
        _errors.append(text.decode(errors="replace").strip())


class LlamaScorer(Scorer):
    """A GGUF file in llama.cpp with its default settings (16-bit KV cache), loaded within ``with``.

    Short sequences are computed several at a time, each as a sequence of its own in one batch.
    """

    def __init__(self, model: Model, context: int) -> None:
        self._path = model.weights
        # Whole units of computation: what is left of one would only be computed less efficiently.
        self._capacity = -(-context // _UBATCH) * _UBATCH
        self._model: Any = None
        self._context: Any = None

    def __enter__(self) -> LlamaScorer:
        import torch

        _errors.clear()
        llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            os.fsencode(self._path), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise self._error("cannot load the model")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = self._capacity
        settings.n_ubatch = _UBATCH
        settings.n_seq_max = _MAX_SEQUENCES
        settings.kv_unified = True  # one cache for all sequences: they differ in length
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            error = self._error(f"cannot make a context of {self._capacity} tokens")
            self._free()
            raise error
        self._batch = llama_cpp.llama_batch_init(self._capacity, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        llama_cpp.llama_batch_free(self._batch)
        self._free()

    def logits(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        """See ``Scorer.logits``: the output layer runs at the positions asked for only."""
        for batch in self._batches(sequences):
            outputs = [len(sequences[i]) - first[i] for i in batch]
            rows = self._decode([sequences[i] for i in batch], [first[i] for i in batch])
            done = 0
            for count in outputs:
                yield rows[done : done + count]
                done += count

    def _batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of neighbours that fit in the context together."""
        batch: list[int] = []
        tokens = 0
        for i, sequence in enumerate(sequences):
            if len(sequence) > self._capacity:
                raise EngineError(
                    f"llamacpp: a sequence has {len(sequence)} tokens, the scorer was opened "
                    f"for {self._capacity} ({self._path})"
                )
            if batch and (tokens + len(sequence) > self._capacity or len(batch) == _MAX_SEQUENCES):
                yield batch
                batch, tokens = [], 0
            batch.append(i)
            tokens += len(sequence)
        if batch:
            yield batch

    def _decode(self, sequences: list[Sequence[int]], first: list[int]) -> torch.Tensor:
        """Logits of all positions asked for, one sequence after another: ``(positions, V)``."""
        import torch

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch = self._batch
        at = 0
        for number, sequence in enumerate(sequences):
            for position, token in enumerate(sequence):
                batch.token[at] = token
                batch.pos[at] = position
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = number
                batch.logits[at] = position >= first[number]
                at += 1
        batch.n_tokens = at
        _errors.clear()
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise self._error(f"llama_decode returned {status} for {at} tokens")
        count = sum(len(s) - f for s, f in zip(sequences, first, strict=True))
        found = llama_cpp.llama_get_logits(self._context)
        # llama.cpp writes the next batch over these.
        return torch.from_numpy(
            np.ctypeslib.as_array(found, shape=(count, self._vocabulary)).copy()
        )

    def _error(self, what: str) -> EngineError:
        said = "; ".join(line for line in _errors if line) or "llama.cpp gave no reason"
        return EngineError(f"llamacpp: {what} ({self._path}): {said}")

    def _free(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._context = self._model = None
