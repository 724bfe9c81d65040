"""What checkpoints call the tensors of transformers' modules, where the names differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_RENAMED: Mapping[str, Mapping[str, str]] = {
    "MixtralForCausalLM": {
        ".mlp.": ".block_sparse_moe.",
        ".gate_proj.": ".w1.",
        ".down_proj.": ".w2.",
        ".up_proj.": ".w3.",
    },
    "GPTNeoXForCausalLM": {"lm_head.": "embed_out."},
}
"""Parts of names in transformers and what checkpoints have instead, by architecture."""


@dataclass(frozen=True)
class StoredNames:
    """The names in one checkpoint: ``stored(name)`` for a tensor of the model."""

    renamed: Mapping[str, str]
    dropped: str
    """The prefix that names in the checkpoint lack."""

    @classmethod
    def of(cls, model: Any, tensors: Iterable[str]) -> StoredNames:
        """The stored names of a transformers model's tensors, experts taken apart, in a checkpoint
        with these tensors."""
        base = f"{model.base_model_prefix}."
        # Checkpoints that were saved without their head lack the prefix: OpenAI's GPT-2.
        dropped = "" if any(name.startswith(base) for name in tensors) else base
        return cls(_RENAMED.get(type(model).__name__, {}), dropped)

    def __call__(self, name: str) -> str:
        """What the checkpoint calls the model's tensor ``name``."""
        for ours, theirs in self.renamed.items():
            name = name.replace(ours, theirs)
        return name.removeprefix(self.dropped)


def is_ignored(model: Any, name: str) -> bool:
    """Whether transformers loads the model without this tensor of the checkpoint, and says
    nothing."""
    patterns = ("rotary_emb.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ()))
    return any(re.search(pattern, name) for pattern in patterns)
