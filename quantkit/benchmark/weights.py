"""How many bytes of weights a step of decoding reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.formats import format_of
from quantkit.models.variant import Model

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|token_embd)\.weight$", re.IGNORECASE
)
_POSITIONS = re.compile(r"(^|\.)(wpe|position_embd|position_embeddings)\.weight$")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_EXPERTS = re.compile(r"\.experts\.|_exps\.")


@dataclass(frozen=True)
class Weights:
    """``shared_bytes`` are read by every token, and of ``expert_bytes`` those of ``chosen`` out of
    ``experts``."""

    shared_bytes: int
    expert_bytes: int = 0
    chosen: int = 0
    experts: int = 0

    def step_bytes(self, requests: int) -> int:
        """Bytes that a step for ``requests`` reads, each weight at most once; for a mixture the
        expected number, for requests that choose their experts independently and evenly: each
        expert stays unread with the chance (1 - chosen / experts) ** requests."""
        if not self.experts:
            return self.shared_bytes
        read = 1 - (1 - self.chosen / self.experts) ** requests
        return self.shared_bytes + round(self.expert_bytes * read)


def weights(model: Model) -> Weights | None:
    """All tensors but embeddings, where a token reads one row; the embedding too where it is the
    output layer as well. None where a mixture does not say how many experts it chooses."""
    return _counted(*format_of(model).served_weights(model))


def _counted(sizes: Mapping[str, int], experts: int, chosen: int) -> Weights | None:
    has_output = any(_OUTPUT.search(name) for name in sizes)
    shared = mixed = 0
    for name, size in sizes.items():
        if _EXPERTS.search(name):
            mixed += size
        elif not (_POSITIONS.search(name) or (has_output and _EMBEDDING.search(name))):
            shared += size
    if mixed and not (experts and chosen):
        return None
    return Weights(shared, mixed, chosen, experts) if mixed else Weights(shared)
