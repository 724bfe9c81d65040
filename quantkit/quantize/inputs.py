"""What the modules of a decoder block see while calibration text runs through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


class InputStatistics:
    """What the linears of a block see: hooks that watch their inputs while the block runs.

    Linears that are called one after another on the very same tensor (q, k and v; gate and up)
    share their statistics. ``leader[name]`` names the first of them; ``hessian[leader]`` is
    XᵀX over all tokens (in, in) float32, ``tokens`` how many there were, ``mean_abs[leader]`` is
    mean |X| per channel (in,) float32.
    """

    def __init__(self, block: nn.Module, linears: Iterable[str]) -> None:
        self.leader: dict[str, str] = {}
        self.hessian: dict[str, torch.Tensor] = {}
        self.mean_abs: dict[str, torch.Tensor] = {}
        self.tokens = 0
        self._last: tuple[str, torch.Tensor] | None = None
        self._first: str | None = None
        modules = dict(block.named_modules())
        self._hooks = [
            modules[name].register_forward_pre_hook(self._hook(name)) for name in linears
        ]

    def close(self) -> None:
        """Take the hooks off and turn sums into means."""
        for hook in self._hooks:
            hook.remove()
        self._last = None
        for leader, total in self.mean_abs.items():
            self.mean_abs[leader] = total / max(1, self.tokens)

    def shared(self) -> dict[str, list[str]]:
        """Leader → all linears that see the same input, in calling order."""
        groups: dict[str, list[str]] = {}
        for name, leader in self.leader.items():
            groups.setdefault(leader, []).append(name)
        return groups

    def _hook(self, name: str) -> Any:
        def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            if self._last is not None and self._last[1] is x:
                self.leader[name] = self._last[0]
                return
            self._last = (name, x)
            self.leader[name] = name
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            if name not in self.hessian:
                self.hessian[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
                self.mean_abs[name] = flat.new_zeros(flat.shape[1])
            self._first = self._first or name
            if name == self._first:
                self.tokens += len(flat)
            self.hessian[name].addmm_(flat.T, flat)
            self.mean_abs[name] += flat.abs().sum(0)

        return watch


class RecordedCalls:
    """Keeps what a module is called with, for the first ``tokens`` tokens, to call it again."""

    def __init__(self, block: nn.Module, name: str, tokens: int) -> None:
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._left = tokens
        self._hook = block.get_submodule(name).register_forward_pre_hook(
            self._keep, with_kwargs=True
        )

    def close(self) -> None:
        """Take the hook off."""
        self._hook.remove()

    def replay(
        self, precision: Callable[[], AbstractContextManager[Any]]
    ) -> Callable[[nn.Module], torch.Tensor]:
        """A function that calls the module again and gives its output, (tokens, out) float32."""

        def run(module: nn.Module) -> torch.Tensor:
            outputs = []
            with torch.no_grad(), precision():
                for inputs, named in self._calls:
                    output = module(*inputs, **named)
                    output = output[0] if isinstance(output, tuple) else output
                    outputs.append(output.reshape(-1, output.shape[-1]).float())
            return torch.cat(outputs)

        return run

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._left <= 0:
            return
        x = inputs[0] if inputs else named["hidden_states"]
        samples = max(1, min(len(x), self._left // x.shape[1]))
        self._left -= samples * x.shape[1]
        if inputs:
            inputs = (x[:samples], *inputs[1:])
        else:
            named = {**named, "hidden_states": x[:samples]}
        self._calls.append((inputs, named))
