"""Safetensors with a config.json and tokenizer files beside them: plain, or packed integers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantkit.formats.base import ServedWeights
from quantkit.models import dtypes
from quantkit.models.chat_template import chat_templates
from quantkit.models.checkpoint import FORMAT, Checkpoint
from quantkit.models.hf_config import count
from quantkit.models.tensors import TensorInfo
from quantkit.models.variant import Model, Variant

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")
_SERVED_FLOAT_BYTES = 2
"""vLLM computes in 16 bits, whatever the checkpoint holds."""


class Safetensors:
    """A transformers checkpoint, which is no variant of another; see ``Format``."""

    name = FORMAT

    def detect(self, path: Path) -> Variant | None:  # noqa: ARG002
        """None: it is opened as a checkpoint."""
        return None

    def files(self, path: Path, names: Collection[str]) -> tuple[Path, ...]:  # noqa: ARG002
        """None: engines are given the directory."""
        return ()

    def inspect(self, model: Model) -> dict[str, Any]:
        """As ``Format.inspect``."""
        checkpoint = opened(model)
        return {
            "architecture": checkpoint.architecture,
            "dtype": checkpoint.scheme,
            "parameters": checkpoint.parameters,
            "tensors": len(checkpoint.tensors),
            "bytes": checkpoint.bytes,
            "context_length": checkpoint.config.get("max_position_embeddings"),
            "shards": len({info.shard for info in checkpoint.tensors.values()}),
            "origin": checkpoint.origin,
            "notes": list(checkpoint.notes),
        }

    def context_length(self, model: Model) -> int:
        """The context length that config.json gives."""
        return count(model.path, "max_position_embeddings")

    def chat_templates(self, model: Model) -> dict[str, str]:
        """The chat templates in the directory."""
        return chat_templates(model.path)

    def vocabulary(self, model: Model) -> list[str] | None:  # noqa: ARG002
        """None: it is in the tokenizer's files."""
        return None

    def served_weights(self, model: Model) -> ServedWeights:
        """Floats count at most two bytes each, everything else as stored; experts by
        config.json."""
        checkpoint = opened(model)
        experts, chosen = (
            next((n for key in keys if isinstance(n := checkpoint.config.get(key), int) and n), 0)
            for keys in (_EXPERT_KEYS, _CHOSEN_KEYS)
        )
        sizes = {name: _served(tensor) for name, tensor in checkpoint.tensors.items()}
        return ServedWeights(sizes, experts, chosen)

    def bits_per_weight(self, variant: Variant, source: Checkpoint) -> tuple[float, float | None]:
        """Bits per weight of all tensors; nothing is quantized."""
        return opened(variant).bytes * 8 / source.parameters, None

    def source(self, variant: Variant, *, allow_requantize: bool) -> Checkpoint | None:  # noqa: ARG002
        """None: what is packed is no source."""
        return None

    def unpacked(self, variant: Variant, source: Checkpoint) -> Model:  # noqa: ARG002
        """The variant itself: the reference engine unpacks it as it loads it."""
        return variant


def opened(model: Model) -> Checkpoint:
    """The directory's tensors and configuration."""
    return model if isinstance(model, Checkpoint) else Checkpoint.open(model.path)


def _served(tensor: TensorInfo) -> int:
    if tensor.dtype in dtypes.WEIGHTS:
        return min(tensor.bytes, tensor.numel * _SERVED_FLOAT_BYTES)
    return tensor.bytes
