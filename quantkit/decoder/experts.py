"""A mixture's experts one by one, as checkpoints hold them; transformers fuses them into stacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Experts(nn.ModuleList):
    """Computes what transformers' module with the stacked ``gate_up_proj`` and ``down_proj`` of all
    experts does, by single linears that can be loaded and observed."""

    def __init__(self, fused: Any) -> None:
        super().__init__(_Expert(fused) for _ in range(fused.num_experts))

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the experts' outputs, as ``hidden``, (tokens, hidden).

        ``chosen``, ``weights``: the experts that a router gives each token, (tokens, top_k).
        """
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, places = torch.where(chosen == number)
            if len(tokens):
                output = expert(hidden[tokens]) * weights[tokens, places, None]
                total.index_add_(0, tokens, output.to(total.dtype))
        return total


class _Expert(nn.Module):
    """A feed-forward network with a gate."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        wide, narrow = fused.hidden_dim, fused.intermediate_dim
        like = {"dtype": fused.down_proj.dtype, "device": fused.down_proj.device}
        self.gate_proj = nn.Linear(wide, narrow, bias=False, **like)
        self.up_proj = nn.Linear(wide, narrow, bias=False, **like)
        self.down_proj = nn.Linear(narrow, wide, bias=False, **like)
        self.act_fn = fused.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return output


def separate(model: nn.Module) -> None:
    """Put ``Experts`` in the place of every stack of them."""
    for name, module in list(model.named_modules()):
        # Elsewhere a linear may have this name: in Phi-3.
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            model.set_submodule(name, Experts(module))
