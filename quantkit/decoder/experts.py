"""A mixture's experts one by one, as engines hold them; transformers fuses them into stacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

Cut = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Stack:
    """How a parameter of transformers' module holds ``parts`` of each of ``count`` experts.

    ``turned``: as (experts, in, out), not (experts, out, in). ``mixed``: the rows of two parts
    take turns, instead of one after the other.
    """

    count: int
    parts: tuple[str, ...]
    turned: bool
    mixed: bool

    def cuts(self) -> Iterator[tuple[str, Cut]]:
        """The name of each part of each expert, and what takes it out of the stack."""
        for number in range(self.count):
            for place, part in enumerate(self.parts):
                yield f"{number}.{part}", partial(self._cut, number, place)

    def _cut(self, number: int, place: int, stack: torch.Tensor) -> torch.Tensor:
        one = stack[number].T if self.turned and stack.dim() == 3 else stack[number]
        if len(self.parts) == 1:
            return one
        return one[place::2] if self.mixed else one.chunk(2)[place]


class Experts(nn.ModuleList):
    """Computes what transformers' module does that holds stacks of all experts' matrices, by
    linears that can be loaded and observed each for itself."""

    def __init__(self, fused: Any) -> None:
        form = _Form.of(fused)
        super().__init__(_Expert(fused, form) for _ in range(fused.down_proj.shape[0]))
        self.stacks = dict(form.stacks(fused))
        """By the names of the module's parameters, what they hold."""
        self.routed = len(inspect.signature(type(fused).forward).parameters) > 2
        """Whether a router gives each its tokens; else each is given every token (Llama 4)."""

    def forward(
        self,
        hidden: torch.Tensor,
        *routes: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum of the experts' outputs, as ``hidden``, (tokens, hidden).

        ``routes``: the experts that a router gives each token, and their weights, (tokens, top_k)
        both. Where there is none ``hidden`` is in as many equal parts as there are experts.
        """
        if not self.routed:
            each = hidden.view(len(self), -1, hidden.shape[-1])
            outputs = [expert(x) for expert, x in zip(self, each, strict=True)]
            return torch.cat(outputs)
        chosen, weights = routes
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, places = torch.where(chosen == number)
            if len(tokens):
                output = expert(hidden[tokens]) * weights[tokens, places, None]
                total.index_add_(0, tokens, output.to(total.dtype))
        return total


@dataclass(frozen=True)
class _Form:
    """``gated``: whether there is a gate. ``turned``, ``mixed``: as in ``Stack``."""

    gated: bool
    turned: bool
    mixed: bool

    @classmethod
    def of(cls, fused: Any) -> _Form:
        if not hasattr(fused, "gate_up_proj"):
            return cls(gated=False, turned=getattr(fused, "is_transposed", False), mixed=False)
        # Twice as many rows as the other has columns, or the other way round.
        turned = fused.gate_up_proj.shape[2] == 2 * fused.down_proj.shape[1]
        return cls(gated=True, turned=turned, mixed=not getattr(fused, "is_concatenated", True))

    def stacks(self, fused: Any) -> Iterator[tuple[str, Stack]]:
        count = fused.down_proj.shape[0]
        first = ("gate_up_proj", ("gate_proj", "up_proj"))
        for leaf, parts in (
            first if self.gated else ("up_proj", ("up_proj",)),
            ("down_proj", ("down_proj",)),
        ):
            weights = tuple(f"{part}.weight" for part in parts)
            yield leaf, Stack(count, weights, self.turned, self.mixed)
            if getattr(fused, f"{leaf}_bias", None) is not None:
                biases = tuple(f"{part}.bias" for part in parts)
                yield f"{leaf}_bias", Stack(count, biases, self.turned, self.mixed)


class _Expert(nn.Module):
    """A feed-forward network, with a gate or without."""

    def __init__(self, fused: Any, form: _Form) -> None:
        super().__init__()
        one = fused.down_proj[0]
        narrow, wide = one.shape if form.turned else reversed(one.shape)
        bias = getattr(fused, "down_proj_bias", None) is not None
        like: Any = {"dtype": one.dtype, "device": one.device, "bias": bias}
        self.gate_proj = nn.Linear(wide, narrow, **like) if form.gated else None
        self.up_proj = nn.Linear(wide, narrow, **like)
        self.down_proj = nn.Linear(narrow, wide, **like)
        self.act_fn: Any = getattr(fused, "act_fn", None)
        self._mixed = form.mixed
        # transformers' own gate, and what it reads of its module.
        self._gate = getattr(type(fused), "_apply_gate", _gate)
        settings = {k: v for k, v in vars(fused).items() if not k.startswith("_")}
        self._settings = SimpleNamespace(**settings | {"act_fn": self.act_fn})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            inner = self.act_fn(self.up_proj(x))
        else:
            both = (self.gate_proj(x), self.up_proj(x))
            joined = torch.stack(both, -1).flatten(-2) if self._mixed else torch.cat(both, -1)
            inner = self._gate(self._settings, joined)
        output: torch.Tensor = self.down_proj(inner)
        return output


def _gate(settings: Any, both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    gated: torch.Tensor = settings.act_fn(gate) * up
    return gated


def separate(model: nn.Module) -> None:
    """Put ``Experts`` in the place of every stack of them."""
    for name, module in list(model.named_modules()):
        down: Any = getattr(module, "down_proj", None)
        first: Any = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
        # Elsewhere linears have these names: in Phi-3.
        stacks = all(isinstance(one, nn.Parameter) and one.dim() == 3 for one in (first, down))
        if stacks and first.shape[0] == down.shape[0]:  # LongCat's stacks have more of one
            model.set_submodule(name, Experts(module))
