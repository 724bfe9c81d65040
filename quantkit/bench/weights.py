"""How many bytes of weights a step of decoding reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import dtypes
from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.variant import Model

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|token_embd)\.weight$", re.IGNORECASE
)
_POSITIONS = re.compile(r"(^|\.)(wpe|position_embd|position_embeddings)\.weight$")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
_EXPERTS = re.compile(r"\.experts\.|_exps\.")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")
_SERVED_FLOAT_BYTES = 2
"""vLLM computes in 16 bits, whatever the checkpoint holds."""


@dataclass(frozen=True)
class Weights:
    """``shared_bytes`` are read by every token, and of ``expert_bytes`` those of ``chosen`` out of
    ``experts``."""

    shared_bytes: int
    expert_bytes: int = 0
    chosen: int = 0
    experts: int = 0

    def step_bytes(self, requests: int) -> int:
        """That a step for so many requests reads, each weight at most once.

        Of a mixture the expected number, for requests that choose their experts independently and
        evenly: each expert stays unread with the chance (1 - chosen / experts) ** requests.
        """
        if not self.experts:
            return self.shared_bytes
        read = 1 - (1 - self.chosen / self.experts) ** requests
        return self.shared_bytes + round(self.expert_bytes * read)


def weights(model: Model) -> Weights | None:
    """All tensors but embeddings, of which a token reads a row; the embedding too where it is the
    output layer as well. None where a mixture does not say how many experts it chooses."""
    if model.format == "gguf":
        return _counted(*_gguf(model.weights))
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model.path)
    sizes = {name: _served_bytes(tensor) for name, tensor in checkpoint.tensors.items()}
    return _counted(sizes, *_mixture(checkpoint.config))


def _counted(sizes: dict[str, int], experts: int, chosen: int) -> Weights | None:
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


def _gguf(path: Path) -> tuple[dict[str, int], int, int]:
    from quantkit.formats.gguf.model_file import ModelFile, stored_bytes

    file = ModelFile.open(path)
    sizes = {tensor.name: stored_bytes(tensor) for tensor in file.tensors}
    prefix = file.architecture
    experts = file.metadata.get(f"{prefix}.expert_count", 0)
    return sizes, int(experts), int(file.metadata.get(f"{prefix}.expert_used_count", 0))


def _mixture(config: dict[str, Any]) -> tuple[int, int]:
    experts, chosen = (
        next((n for key in keys if isinstance(n := config.get(key), int) and n), 0)
        for keys in (_EXPERT_KEYS, _CHOSEN_KEYS)
    )
    return experts, chosen


def _served_bytes(tensor: TensorInfo) -> int:
    if tensor.dtype in dtypes.WEIGHTS:
        return min(tensor.bytes, tensor.numel * _SERVED_FLOAT_BYTES)
    return tensor.bytes
