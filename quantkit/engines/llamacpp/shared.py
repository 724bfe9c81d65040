"""Sequences that begin alike in llama.cpp: each of their tokens is computed once.

A token is computed as part of all the sequences of its step that pass through it, and the cache
holds it for all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import llama_cpp

from quantkit.engines.llamacpp.context import MAX_SEQUENCES, UBATCH, Context, Token
from quantkit.engines.prefixes import Part, Walk

if TYPE_CHECKING:
    import torch

_PATH = 0
"""The sequence that keeps, between the steps, what the next step begins with."""


def shareable(model: Any) -> bool:
    """Whether a sequence may begin with another's cells: not with sliding windows or recurrent
    states, where they are not all kept."""
    return (
        llama_cpp.llama_model_n_swa(model) == 0
        and not llama_cpp.llama_model_is_recurrent(model)
        and not llama_cpp.llama_model_is_hybrid(model)
    )


def scaled_by_length(model: Any) -> bool:
    """Whether positions may be encoded differently in a larger context, as with LongRoPE: the model
    names the context that it was made for at first."""
    architecture = _metadata(model, "general.architecture")
    return bool(_metadata(model, f"{architecture}.rope.scaling.original_context_length"))


def compute(
    context: Context, sequences: Sequence[Sequence[int]], first: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Logits of each sequence from ``first[i]`` on. The context has ``UBATCH`` cells to spare."""
    import torch

    walk = Walk(sequences)
    outputs: dict[int, torch.Tensor] = {}
    """Logits by position on the path, where this sequence or a later one asks for them."""
    context.clear()
    for step, following in pairwise(chain(walk.steps(UBATCH, MAX_SEQUENCES - 1), [None])):
        assert step is not None
        wanted = [walk.outputs(part, first) for part in step]
        tokens = _tokens(context, sequences, step, wanted)
        found = iter(context.decode(tokens) if tokens else ())
        for part, positions in zip(step, wanted, strict=True):
            outputs = {at: row for at, row in outputs.items() if at < part.start}
            outputs |= {at: next(found) for at in positions}
            i = part.sequence
            if part.stop == len(sequences[i]):
                yield torch.stack([outputs[at] for at in range(first[i], part.stop)])
        if following:
            # A copy, so that the whole batch is not kept in memory.
            outputs = {at: row.clone() for at, row in outputs.items() if at < following[0].start}
            context.keep(len(step))
            context.remove(len(step), following[0].start)
            context.copy(len(step), _PATH, following[0].start)
            context.keep(_PATH)


def _tokens(
    context: Context, sequences: Sequence[Sequence[int]], step: list[Part], wanted: list[list[int]]
) -> list[Token]:
    """A step's tokens. Part k is computed as sequence k + 1, which begins with the path's cells."""
    beginning = step[0].start
    for number, part in enumerate(step, start=1):
        beginning = min(beginning, part.start)
        context.copy(_PATH, number, beginning)
    tokens = []
    for k, (part, positions) in enumerate(zip(step, wanted, strict=True)):
        asked = set(positions)
        members = [k + 1]
        # Later parts pass through this one, up to the lowest start on the way.
        reaches = []
        lowest = part.stop
        for later in range(k + 1, len(step)):
            lowest = min(lowest, step[later].start)
            if lowest <= part.start:
                break
            reaches.append((lowest, later + 1))
        for at in range(part.start, part.stop):
            members = [k + 1, *(number for reach, number in reaches if at < reach)]
            tokens.append(Token(sequences[part.sequence][at], at, members, at in asked))
    return tokens


def _metadata(model: Any, key: str) -> str:
    """A value of the GGUF file, empty where it has none."""
    value = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_meta_val_str(model, key.encode(), value, len(value))
    return value.value.decode()
