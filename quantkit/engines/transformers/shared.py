"""Sequences that begin alike in transformers: each of their tokens is computed once.

The tokens of a step stand in one row, one part after another, without padding. A mask lets each see
the tokens that it follows, in the step and in the cache, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from quantkit.engines.prefixes import Walk

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Found:
    """What a step leaves. ``states``: ``(rows, hidden)``, what the output layer is given;
    ``ended``: the sequences that it ended, each with the rows of its outputs."""

    states: torch.Tensor
    ended: list[tuple[int, torch.Tensor]]


def compute(
    model: Any, sequences: Sequence[Sequence[int]], first: Sequence[int], tokens: int
) -> Iterator[Found]:
    """Compute ``sequences`` in steps of ``tokens``; outputs are from ``first[i]`` on.

    Between the steps, keys, values and states of the path are kept, one sequence at most.
    """
    import torch
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config)
    states: torch.Tensor | None = None
    path = torch.empty(0, dtype=torch.long)
    for step, following in pairwise(chain(Walk(sequences).steps(tokens), [None])):
        assert step is not None
        ids = [t for part in step for t in sequences[part.sequence][part.start : part.stop]]
        ended = []
        mask = torch.zeros(len(ids), len(path) + len(ids), dtype=torch.bool)
        at = 0
        row = len(path)
        for part in step:
            count = part.stop - part.start
            new = torch.arange(row, row + count)
            path = torch.cat([path[: part.start], new])
            mask[at : at + count, path] = True
            mask[at : at + count, new] = torch.ones(count, count, dtype=torch.bool).tril()
            if part.stop == len(sequences[part.sequence]):
                ended.append((part.sequence, path[first[part.sequence] :]))
            at, row = at + count, row + count
        if ids:
            positions = [p for part in step for p in range(part.start, part.stop)]
            new_states = _forward(model, cache, ids, positions, mask)
            states = new_states if states is None else torch.cat([states, new_states])
        assert states is not None
        yield Found(states, ended)
        if following:
            kept = path[: following[0].start].to(model.device)
            path = torch.arange(len(kept))
            states = states[kept]
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]


def _forward(
    model: Any, cache: Any, ids: list[int], positions: list[int], mask: torch.Tensor
) -> torch.Tensor:
    """Final hidden states of one row of tokens, ``(tokens, hidden) float32``."""
    import torch

    blocked = torch.zeros(mask.shape, dtype=model.dtype).masked_fill_(~mask, float("-inf"))
    with torch.inference_mode():
        found = model.base_model(
            input_ids=torch.tensor([ids], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            attention_mask=blocked[None, None].to(model.device),
            past_key_values=cache,
            use_cache=True,
        )
        states: torch.Tensor = found.last_hidden_state[0].float()
    return states


def shareable(model: Any) -> bool:
    """Whether this model can compute several continuations of one beginning side by side.

    Not where a layer keeps less than all earlier tokens (sliding windows, recurrent states), or
    where a trial gives something else than each sequence by itself.
    """
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    trial = [[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 7, 8]]
    near = 1e-3 if model.dtype == torch.float32 else 5e-2
    try:
        found = [
            step.states[rows]
            for step in compute(model, trial, [0] * len(trial), tokens=4)
            for _, rows in step.ended
        ]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        # It takes no such mask, positions or cache.
        return False
    for ids, states in zip(trial, found, strict=True):
        with torch.inference_mode():
            alone = model.base_model(
                input_ids=torch.tensor([ids], device=model.device), use_cache=False
            ).last_hidden_state[0]
        error = (states - alone).abs().max() / alone.abs().max()
        if not error < near:
            return False
    return True


def scaled_by_length(model: Any, context: int) -> bool:
    """Whether positions up to ``context`` are encoded differently in long and short inputs.

    Then keys of a beginning are of no use later (LongRoPE, dynamic NTK), and padding matters.
    """
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "rope_parameters", None) or {}
    scalings = [found, *(value for value in found.values() if isinstance(value, dict))]
    return any(
        ("dynamic" in kind or kind == "longrope")
        and context
        > scaling.get("original_max_position_embeddings", config.max_position_embeddings)
        for scaling in scalings
        if (kind := scaling.get("rope_type", ""))
    )
