"""Linears whose input channels can be scaled, since what precedes them can be scaled back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.decoder.expert_names import ROUTER, expert_of, is_routed

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Family:
    """Linears with one input whose scaling folds into one module before them.

    ``fold`` is a norm or a linear (its output channels); ``judge`` the module whose output error
    decides, or None where the reader's own output is it. ``given``: the module whose input is the
    family's.
    """

    fold: str
    readers: tuple[str, ...]
    judge: str | None
    given: str
    followers: tuple[str, ...] = ()
    """What has the same input too and is not quantized: a router."""


def families(linears: Iterable[str]) -> list[Family]:
    """Those of a Llama-shaped block, by the names of its linears that are quantized; the MLP may be
    a mixture of experts."""
    names = set(linears)
    found = [
        _family("input_layernorm", _ATTENTION, "self_attn"),
        _family("self_attn.v_proj", ("self_attn.o_proj",)),
    ]
    routed = [name for name in linears if is_routed(name)]
    if routed:
        readers = tuple(name for name in routed if not name.endswith(".down_proj"))
        norm = "post_attention_layernorm"
        found.append(Family(norm, readers, "mlp", given="mlp", followers=(ROUTER,)))
        experts = dict.fromkeys(map(expert_of, routed))
        found += [_family(f"{one}.up_proj", (f"{one}.down_proj",)) for one in experts]
    else:
        found += [
            _family("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
            _family("mlp.up_proj", ("mlp.down_proj",)),
        ]
    return [family for family in found if names.issuperset(family.readers)]


def _family(fold: str, readers: tuple[str, ...], judge: str | None = None) -> Family:
    return Family(fold, readers, judge, given=readers[0])


def fold_scales(block: nn.Module, family: Family, scale: torch.Tensor) -> None:
    """Multiply the family's input channels by ``scale`` (in,) and divide what feeds it by it.

    The block computes the same function as before, but for rounding.
    """
    for name in (*family.readers, *family.followers):
        block.get_parameter(f"{name}.weight").data.mul_(scale)
    module: Any = block.get_submodule(family.fold)
    folded = fold_channels(block, family).pick(scale)
    module.weight.data.div_(folded if module.weight.dim() == 1 else folded[:, None])
    if getattr(module, "bias", None) is not None:
        module.bias.data.div_(folded)


@dataclass(frozen=True)
class FoldChannels:
    """How the readers' input channels relate to the output channels of what precedes them.

    One to one, except where a key/value head's channels are repeated for each of its query heads:
    then the copies must share their scale.
    """

    heads: int = 1
    copies: int = 1

    def _view(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(self.heads, self.copies, -1)

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """(in,) → (fold,): mean over the copies."""
        return self._view(values).mean(1).flatten()

    def expand(self, values: torch.Tensor) -> torch.Tensor:
        """(fold,) → (in,): the same for every copy."""
        per_head = values.view(self.heads, 1, -1)
        return per_head.expand(-1, self.copies, -1).reshape(-1)

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """(in,) → (fold,): of copies that are equal, the first."""
        return self._view(values)[:, 0].flatten()


def fold_channels(block: nn.Module, family: Family) -> FoldChannels:
    """How they relate in a family of ``block``."""
    read = block.get_parameter(f"{family.readers[0]}.weight").shape[1]
    module: Any = block.get_submodule(family.fold)
    width: int = module.weight.shape[0]
    if width == read:
        return FoldChannels()
    attention: Any = block.get_submodule(family.fold.rpartition(".")[0])
    return FoldChannels(heads=width // attention.head_dim, copies=read // width)
