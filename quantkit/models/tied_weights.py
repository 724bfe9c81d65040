"""Weights that a model has once under two names, as transformers ties them when it loads them.

Which they are is asked of transformers: config.json alone does not decide. Where both are stored
and differ, transformers 5 leaves them apart; where only the second is, it takes that for both
(``PreTrainedModel.tie_weights``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.models.stored_names import StoredNames

if TYPE_CHECKING:
    from quantkit.models.tensors import TensorInfo

KEY = "tie_word_embeddings"
_OF_BLOCK = re.compile(r"\.\d+\.")
_EMBEDDING = re.compile(r"emb|wte")
_ROWS = 4096
"""Compared at a time."""


@dataclass(frozen=True)
class Tied:
    """``tensors``: what is stored, under the names by which the model knows it. ``twice``: those
    of them that are equal to others and tied to them. ``apart``: pairs that config.json ties and
    the stored values do not."""

    tensors: dict[str, TensorInfo]
    twice: frozenset[str] = frozenset()
    apart: tuple[tuple[str, str], ...] = ()

    @property
    def note(self) -> str | None:
        """What a reader should know; None where config.json describes the weights."""
        if not self.apart:
            return None
        one, other = self.apart[0]
        return (
            f"config.json ties {one} to {other}, but both are stored and differ: they are not "
            "tied, as by transformers"
        )


def resolve(directory: Path, config: Mapping[str, Any], tensors: dict[str, TensorInfo]) -> Tied:
    """What transformers would make of the tied weights of a checkpoint.

    It is asked only where there is something to ask, as its import takes seconds.
    """
    if config.get(KEY) is False or not _ambiguous(tensors):
        return Tied(tensors)
    tensors, twice, apart = dict(tensors), set(), []
    for target, source in _pairs(directory, tensors).items():
        if target in tensors and source in tensors:
            if _equal(tensors[target], tensors[source]):
                twice.add(target)
            else:
                apart.append((target, source))
        elif target in tensors:
            stored = tensors.pop(target)
            tensors[source] = replace(stored, name=source, stored=target)
    return Tied(tensors, frozenset(twice), tuple(apart))


def _ambiguous(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether, outside of the blocks, two matrices have one shape, or none is an embedding."""
    outer = {
        name: info.shape
        for name, info in tensors.items()
        if len(info.shape) == 2 and not _OF_BLOCK.search(name)
    }
    same = any(count > 1 for count in Counter(outer.values()).values())
    return same or (bool(outer) and not any(map(_EMBEDDING.search, outer)))


def _pairs(directory: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Which tensor is tied to which, by the checkpoint's names; empty for a model that transformers
    does not have."""
    import torch

    from quantkit.models.hf_config import read_config

    try:
        config = read_config(directory)
        if not any(getattr(part, KEY, False) for part in (config, config.get_text_config())):
            return {}
        from transformers import AutoModelForCausalLM

        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # a wrong config is reported where the model is needed
        return {}
    stored = StoredNames.of(model, tensors)
    pairs: Mapping[str, str] = model.all_tied_weights_keys
    return {stored(target): stored(source) for target, source in pairs.items()}


def _equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether they hold the same values, in whatever types."""
    import torch
    from safetensors import safe_open

    if one.shape != other.shape:
        return False
    with (
        safe_open(one.shard, framework="pt") as first,
        safe_open(other.shard, framework="pt") as second,
    ):
        a, b = first.get_slice(one.name), second.get_slice(other.name)
        return all(
            torch.equal(a[row : row + _ROWS].double(), b[row : row + _ROWS].double())
            for row in range(0, one.shape[0], _ROWS)
        )
