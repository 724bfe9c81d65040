"""Linears whose matrices transformers holds, and checkpoints store, as (in, out): GPT-2's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Turned:
    """The one part of such a matrix: itself, as (out, in)."""

    parts: tuple[str, ...] = ("weight",)

    def cuts(self) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
        """The part's name, and what takes it out."""
        yield "weight", torch.t


class TurnedLinear(nn.Linear):
    """A linear in the place of ``Conv1D``, which computes the same."""

    def __init__(self, conv: Any) -> None:
        rows, columns = conv.weight.shape
        super().__init__(rows, columns, dtype=conv.weight.dtype, device=conv.weight.device)
        self.stacks = {"weight": Turned()}
        """As in ``Experts``."""


def turn(model: nn.Module) -> None:
    """Put ``TurnedLinear`` in the place of every ``Conv1D``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, TurnedLinear(module))
