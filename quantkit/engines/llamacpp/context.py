"""A context of llama.cpp: a cache of keys and values, and what is computed into it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np

from quantkit.engines.llamacpp.kv_cache import DEFAULT, needs_flash_attention
from quantkit.errors import EngineError
from quantkit.formats.gguf import ggml

if TYPE_CHECKING:
    import torch

UBATCH = 512
"""Tokens that llama.cpp computes together; ``llama-perplexity``'s default, so numbers are its."""
MAX_SEQUENCES = 64
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


def listen() -> None:
    """Have llama.cpp's log come here; what it said before is forgotten."""
    _errors.clear()
    llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p(0))


def error(what: str, path: Path) -> EngineError:
    """What failed, and the reason that llama.cpp gave."""
    return EngineError(f"llamacpp: {what} ({path}): {reason()}")


def reason() -> str:
    """The errors in llama.cpp's log since ``listen``, in one line."""
    return "; ".join(line for line in _errors if line) or "llama.cpp gave no reason"


@dataclass(frozen=True)
class Token:
    """One token to compute, in all the sequences that it is part of."""

    id: int
    position: int
    sequences: Sequence[int]
    output: bool
    """Whether its logits are wanted."""


class Context:
    """A cache of ``cells`` tokens, which all sequences draw from; ``kv_cache``: its type."""

    def __init__(self, model: Any, path: Path, cells: int, kv_cache: str = DEFAULT) -> None:
        import torch

        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = cells
        settings.n_ubatch = UBATCH
        settings.n_seq_max = MAX_SEQUENCES
        settings.kv_unified = True  # one cache for all sequences: they differ in length
        kind = ggml.types()[kv_cache.upper()].number
        settings.type_k = settings.type_v = kind
        if needs_flash_attention(kv_cache):
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._path = path
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            raise error(f"cannot make a context of {cells} tokens", path)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(cells, 0, MAX_SEQUENCES)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def close(self) -> None:
        """Free it; before the model."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def clear(self) -> None:
        """Forget every sequence."""
        llama_cpp.llama_memory_clear(self._memory, True)

    def copy(self, source: int, target: int, stop: int) -> None:
        """Let a sequence begin with the first ``stop`` tokens of another; nothing is moved."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, stop)

    def remove(self, sequence: int, start: int = 0) -> None:
        """Forget a sequence from the position ``start`` on."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def keep(self, sequence: int) -> None:
        """Forget all sequences but one."""
        llama_cpp.llama_memory_seq_keep(self._memory, sequence)

    def decode(self, tokens: Iterable[Token]) -> torch.Tensor:
        """Compute ``tokens``; logits where they are wanted, ``(outputs, vocabulary) float32``.

        Raise EngineError with llama.cpp's reason where it refuses.
        """
        import torch

        batch = self._batch
        count = outputs = 0
        for count, token in enumerate(tokens, start=1):
            at = count - 1
            batch.token[at] = token.id
            batch.pos[at] = token.position
            batch.n_seq_id[at] = len(token.sequences)
            for number, sequence in enumerate(token.sequences):
                batch.seq_id[at][number] = sequence
            batch.logits[at] = token.output
            outputs += token.output
        batch.n_tokens = count
        _errors.clear()
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise error(f"llama_decode returned {status} for {count} tokens", self._path)
        if not outputs:
            return torch.empty(0, self._vocabulary)
        found = llama_cpp.llama_get_logits(self._context)
        # llama.cpp writes the next batch over these.
        return torch.from_numpy(
            np.ctypeslib.as_array(found, shape=(outputs, self._vocabulary)).copy()
        )
