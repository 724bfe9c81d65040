"""What the modules of a decoder block see while calibration text runs through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.decoder.expert_names import is_routed
from quantkit.errors import ConversionError
from quantkit.system.stopwatch import stage


class InputStatistics:
    """What modules of a block see: hooks that watch their inputs while the block runs.

    Modules that are called one after another on the very same tensor (q, k and v; gate and up)
    share their statistics. ``leader[name]`` names the first of them; a module that was never
    called, as an expert that no token is given, has none. ``hessian[leader]`` is
    XᵀX over one in ``every`` tokens (in, in), of an expert over all that it is given; float32 or,
    where blocks compute without autocast, float64. ``mean_abs[leader]`` is
    mean |X| per channel (in,), likewise. X is what a linear multiplies: rounded to bfloat16 where
    it computes in that.
    """

    def __init__(self, block: nn.Module, names: Iterable[str], every: int = 1) -> None:
        self._every = every
        self.leader: dict[str, str] = {}
        self.hessian: dict[str, torch.Tensor] = {}
        self.mean_abs: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        modules = dict(block.named_modules())
        self._hooks = [modules[name].register_forward_pre_hook(self._hook(name)) for name in names]

    def close(self) -> None:
        """Take the hooks off and turn sums into means."""
        for hook in self._hooks:
            hook.remove()
        self._last = None
        for leader, total in self.mean_abs.items():
            self.mean_abs[leader] = total / max(1, self._tokens[leader])

    def shared(self) -> dict[str, list[str]]:
        """Leader → all modules that see the same input, in calling order."""
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
            with stage("hessian"):
                self._add(name, x.detach().reshape(-1, x.shape[-1]))

        return watch

    def _add(self, name: str, x: torch.Tensor) -> None:
        """Add what one module sees of one batch: (tokens, in)."""
        x = multiplied(x)
        if name not in self.hessian:
            self.hessian[name] = empty_gram(x)
            self.mean_abs[name] = self.hessian[name].new_zeros(x.shape[1])
            self._tokens[name] = 0
        self._tokens[name] += len(x)
        some = x if is_routed(name) else x[:: self._every]
        add_gram(self.hessian[name], some, some)
        self.mean_abs[name] += x.abs().sum(0, dtype=self.mean_abs[name].dtype)


def dead_channels(size: torch.Tensor, where: str) -> int:
    """How many input channels were zero on every token; ``size``: (in,) sums of |X| or X².

    Raise ConversionError where an input was not finite, and so its sum is not.
    """
    if not torch.isfinite(size).all():
        raise ConversionError(f"{where}: its input on calibration text is not finite")
    return int((size == 0).sum())


def multiplied(x: torch.Tensor) -> torch.Tensor:
    """What a linear multiplies when it is called here with ``x``: rounded by autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def empty_gram(x: torch.Tensor) -> torch.Tensor:
    """Zeros to sum the products of channels of x in: (n, n) for x (tokens, n).

    float32, or float64 for what is to be the same on every device: summed more exactly than it
    was computed.
    """
    dtype = torch.float32 if x.dtype == torch.bfloat16 else torch.float64
    return x.new_zeros(x.shape[1], x.shape[1], dtype=dtype)


def add_gram(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += leftᵀ right, with products and sums in the dtype of total (n, m); left (tokens, n),
    right (tokens, m)."""
    if left.device.type == "cuda" and left.dtype == right.dtype == torch.bfloat16:
        # Tensor cores multiply 16-bit numbers exactly and add in float32; the CPU's cannot.
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        left, right = left.to(total.dtype), right.to(total.dtype)
        total.addmm_(left.T, right)


def add_correction(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """As ``add_gram``, for what is small beside the rest: products rounded as ``right`` is, which
    is faster."""
    total.add_(left.to(right.dtype).T @ right)


@dataclass(frozen=True)
class Reached:
    """What a linear multiplies, (tokens, in), and the residual stream that it is to be added to,
    (tokens, hidden)."""

    inputs: torch.Tensor
    stream: torch.Tensor | None


def reach(
    module: nn.Module, linear: str, stream: str | None, run: Callable[[nn.Module], object]
) -> Reached:
    """Let ``run`` run ``module`` up to one of its linears; nothing after that is computed.

    ``stream``: the module of it that is given the residual stream, if that is wanted. Raise
    ConversionError where the linear is not reached.
    """
    seen: list[torch.Tensor] = []

    def see(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(_rows(inputs[0]))

    def stop(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise _Stop(Reached(_rows(multiplied(inputs[0])), seen[0] if seen else None))

    hooks = [module.get_submodule(linear).register_forward_pre_hook(stop)]
    if stream:
        hooks.append(module.get_submodule(stream).register_forward_pre_hook(see))
    try:
        run(module)
    except _Stop as stopped:
        return stopped.reached
    finally:
        for hook in hooks:
            hook.remove()
    raise ConversionError(f"{linear} sees no token of the calibration text; use more of it")


class _Stop(Exception):
    def __init__(self, reached: Reached) -> None:
        self.reached = reached


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
