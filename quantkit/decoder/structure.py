"""What a decoder block is made of: found by asking the block itself, and proved on it.

Linears with the same input, linears that add to the residual stream, and norms or linears that can
take a scale from the linears after them: tables of these hold for one family and break the next one
in silence, a proof does not. A block is asked with random weights: its structure is the
architecture's, whatever the values are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantkit.decoder.experts import Experts

TOKENS = 8
"""How many random tokens a block is asked with."""
_NEAR = 1e-9
"""Two values in float64 are the same, relative to the largest of their tensor."""
_PERIOD = 1_000_003
_ASKED_EXPERTS = 2
"""How many experts of a mixture are asked: the others are built alike (``decoder/experts.py``)."""


@dataclass(frozen=True)
class FoldChannels:
    """How the balance layers' input channels relate to the smooth layer's output channels.

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


@dataclass(frozen=True)
class Fold:
    """Balance layers, whose input channels can be scaled because the smooth layer before them can
    be divided by the same scales: what AWQ calls a mapping."""

    smooth_layer: str
    """The norm or linear whose output channels are divided."""
    balance_layers: tuple[str, ...]
    """The linears that read its output, in the order of their calls."""
    routers: tuple[str, ...] = ()
    """Routers: modules that share the input and are no linears."""
    given: str = ""
    """The first of these modules that is given every token."""
    offset: float = 0.0
    """What a norm adds to its weight before it multiplies by it."""
    channels: FoldChannels = FoldChannels()


@dataclass(frozen=True)
class Structure:
    """What was found on a block, by names in the block, and proved."""

    calls: tuple[str, ...]
    """Linears in the order of their calls."""
    inputs: tuple[tuple[str, ...], ...]
    """Linears with one input together."""
    writers: Mapping[str, str]
    """Linears whose output is added to the residual stream as it is, and the last module before
    each that is given the stream."""
    folds: tuple[Fold, ...]
    unfolded: Mapping[str, str]
    """Linears that no scale can be taken from, and why."""


def fold_scales(block: nn.Module, fold: Fold, scale: torch.Tensor) -> None:
    """Multiply the balance layers' inputs by ``scale`` (in,) and divide the smooth layer by it.

    The block computes the same function as before, but for rounding.
    """
    for name in (*fold.balance_layers, *fold.routers):
        block.get_parameter(f"{name}.weight").data.mul_(scale)
    _divide(block.get_submodule(fold.smooth_layer), fold.channels.pick(scale), fold.offset)


def fold_error(
    block: nn.Module,
    fold: Fold,
    hidden: torch.Tensor,
    arguments: Mapping[str, Any],
    before: torch.Tensor | None = None,
) -> float:
    """How far the block's output moves by scales between ½ and 2, relative to its largest value.

    The block is in float64, and afterwards as it was. ``before``: its output, where that is known.
    """
    width = block.get_parameter(f"{fold.balance_layers[0]}.weight").shape[1]
    scale = fold.channels.expand(_factors(width // fold.channels.copies))
    before = _run(block, hidden, arguments) if before is None else before
    names = (fold.smooth_layer, *fold.balance_layers, *fold.routers)
    with _copied([block.get_submodule(name) for name in names]):
        fold_scales(block, fold, scale)
        after = _run(block, hidden, arguments)
    return float((after - before).abs().max() / before.abs().max())


def ask(block: nn.Module, shape: Sequence[int], arguments: Mapping[str, Any]) -> Structure:
    """The structure of a block as the skeleton has it, on no device.

    ``arguments``: what the model passes to it besides activations (1, TOKENS, *shape).
    """
    sizes = {
        name: len(module)
        for name, module in block.named_modules()
        if isinstance(module, Experts) and module.routed
    }
    for name in sizes:
        experts: Any = block.get_submodule(name)
        del experts[_ASKED_EXPERTS:]
    fill(block)
    hidden = torch.randn(1, TOKENS, *shape, generator=_seeded(), dtype=torch.float64)
    return _of_all_experts(find(block, hidden, arguments), sizes)


def fill(module: nn.Module, but: Sequence[nn.Module] = ()) -> None:
    """Give random weights in float64 to all parameters that are on no device, but for those of
    ``but``; vectors are positive, and matrices are parts of one storage."""
    kept = {id(one) for part in but for one in part.parameters()}
    empty = [one for one in module.parameters() if one.is_meta and id(one) not in kept]
    seeded = _seeded()
    # Numbers that repeat: to draw as many would take longer than all the rest.
    line = torch.randn(_PERIOD, generator=seeded, dtype=torch.float64)
    largest = max((one.numel() for one in empty), default=0)
    width = max((one.shape[-1] for one in empty if one.dim() < 2), default=1)
    line = line.div_(width**0.5).repeat(largest // _PERIOD + 2)
    values = {}
    for one in empty:
        if one.dim() < 2:
            values[id(one)] = _factors(one.numel(), seeded).view(one.shape)
        else:
            first = int(torch.randint(_PERIOD, (1,), generator=seeded))
            values[id(one)] = line[first : first + one.numel()].view(one.shape)
    for part in module.modules():
        for name, one in list(part.named_parameters(recurse=False)):
            if id(one) in values:
                setattr(part, name, nn.Parameter(values[id(one)], requires_grad=False))


def find(block: nn.Module, hidden: torch.Tensor, arguments: Mapping[str, Any]) -> Structure:
    """The structure of a block that holds weights in float64, asked with ``hidden`` (1, T, width).

    A linear that the block does not call is no part of it: others read its matrix.
    """
    arguments = _wide(arguments)
    asked = _Asked(block.eval(), hidden, arguments)
    linears = {name for name in asked.calls if asked.is_linear(name)}
    called = [name for name in asked.calls if name in linears]
    inputs: dict[Any, list[str]] = {}
    for name in called:
        x = asked.calls[name].input
        inputs.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(name)
    folds: list[Fold] = []
    why: dict[str, str] = {}
    for smooth in asked.smooth_layers():
        fold = _fold(asked, smooth, linears)
        if isinstance(fold, _Refused):
            why |= dict.fromkeys(fold.balance_layers, fold.why)
        elif fold and not set(fold.balance_layers) & {
            name for one in folds for name in one.balance_layers
        }:
            error = fold_error(block, fold, hidden, arguments, asked.output)
            if error < _NEAR:
                folds.append(fold)
            else:
                said = f"scaled in {smooth}, the block's output moves by {error:.1g}"
                why |= dict.fromkeys(fold.balance_layers, said)
    scaled = {name for fold in folds for name in fold.balance_layers}
    nothing = "nothing before it takes a scale"
    return Structure(
        calls=tuple(called),
        inputs=tuple(map(tuple, inputs.values())),
        writers=_writers(asked, called),
        folds=tuple(sorted(folds, key=lambda fold: called.index(fold.balance_layers[0]))),
        unfolded={name: why.get(name, nothing) for name in called if name not in scaled},
    )


@dataclass(frozen=True)
class _Call:
    input: torch.Tensor
    output: Any
    rest: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Refused:
    balance_layers: tuple[str, ...]
    why: str


class _Leak(Exception):
    """A change reached a matrix in another way than as a scale."""


class _Asked:
    """A block and what it computed once. In the runs after it, matrices do not compute: what they
    give is known, or changed on purpose."""

    def __init__(
        self, block: nn.Module, hidden: torch.Tensor, arguments: Mapping[str, Any]
    ) -> None:
        self.block, self.hidden, self._arguments = block, hidden, arguments
        self.modules = dict(block.named_modules())
        self.calls: dict[str, _Call] = {}
        """The calls of modules with a matrix, in order."""
        self.norms: dict[str, _Call] = {}
        """The calls of modules whose weight is a vector as wide as their output."""
        self.given: dict[str, torch.Tensor] = {}
        """What modules are called with, in order."""
        hooks = []
        for name, module in list(self.modules.items())[1:]:
            hooks.append(module.register_forward_pre_hook(self._see(name)))
            hooks.append(module.register_forward_hook(self._keep(name), with_kwargs=True))
        try:
            self.output = _run(block, hidden, arguments)
        finally:
            for hook in hooks:
                hook.remove()

    def smooth_layers(self) -> Iterator[str]:
        """All that could take a scale into its weight."""
        yield from self.norms
        yield from (name for name in self.calls if self.is_linear(name))

    def is_linear(self, name: str) -> bool:
        """Whether a module with a matrix is no more than that: a router may be, and give more."""
        output = self.calls[name].output
        return isinstance(self.modules[name], nn.Linear) and isinstance(output, torch.Tensor)

    def run(
        self,
        meet: Callable[[str, torch.Tensor], None],
        hidden: torch.Tensor | None = None,
        changed: str | None = None,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The block's output where every matrix gives what it gave, after ``meet`` was told its
        name and input, and ``change`` is made to the output of the module ``changed``."""
        hooks = []
        with _forwards(self.modules, self.calls, meet):
            if changed is not None and change is not None:
                hook: Any = lambda _, __, output: change(output)  # noqa: E731
                hooks.append(self.modules[changed].register_forward_hook(hook))
            try:
                given = self.hidden if hidden is None else hidden
                return _run(self.block, given, self._arguments)
            finally:
                for one in hooks:
                    one.remove()

    def _see(self, name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor):
                self.given.setdefault(name, inputs[0])

        return see

    def _keep(self, name: str) -> Any:
        def keep(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is None or not inputs or not isinstance(inputs[0], torch.Tensor):
                return
            call = _Call(inputs[0], output, inputs[1:], named)
            if weight.dim() == 2:
                self.calls.setdefault(name, call)
            elif isinstance(output, torch.Tensor) and output.shape[-1:] == weight.shape:
                self.norms.setdefault(name, call)

        return keep


def _fold(asked: _Asked, smooth: str, linears: set[str]) -> Fold | _Refused | None:
    """What reads the output of ``smooth``, where nothing else does; None where nothing does that
    has a matrix."""
    call = asked.norms.get(smooth) or asked.calls[smooth]
    factors = _factors(call.output.shape[-1])
    found: dict[str, FoldChannels] = {}

    def meet(name: str, x: torch.Tensor) -> None:
        before = asked.calls[name].input
        if _same(x, before):
            return
        channels = _channels(x, before, factors)
        if channels is None:
            raise _Leak(name)
        found[name] = channels

    try:
        output = asked.run(meet, changed=smooth, change=lambda given: given / factors)
        leaks = not _same(output, asked.output)
    except _Leak:
        leaks = True
    balance = tuple(name for name in found if name in linears)
    if not balance:
        return None
    if leaks:
        return _Refused(balance, f"the output of {smooth} is used elsewhere, too")
    if len(set(found.values())) > 1:
        return _Refused(balance, f"they take the channels of {smooth} in different orders")
    offset = _offset(asked, smooth, factors)
    if offset is None:
        return _Refused(balance, f"{smooth} multiplies by neither its weight nor 1 + weight")
    given = next((name for name in found if not _expert(asked, name)), None)
    if given is None and len(balance) > 1:
        return _Refused(balance, "nothing that reads it is given every token")
    return Fold(
        smooth,
        balance,
        routers=tuple(name for name in found if name not in linears),
        given=given or balance[0],
        offset=offset,
        channels=found[balance[0]],
    )


def _channels(x: torch.Tensor, before: torch.Tensor, factors: torch.Tensor) -> FoldChannels | None:
    """How channels of x (…, in), which were ``before``, were divided by factors (out,); None where
    they were not."""
    if x.shape != before.shape or x.shape[-1] % len(factors):
        return None
    x, before = x.reshape(-1, x.shape[-1]), before.reshape(-1, x.shape[-1])
    if len(factors) == x.shape[1]:
        return FoldChannels() if _same(x * factors, before) else None
    largest = before.abs().argmax(0)
    ratio = (before / x).gather(0, largest[None])[0]
    ordered, places = factors.sort()
    right = torch.searchsorted(ordered, ratio).clamp(1, len(ordered) - 1)
    nearer = (ratio - ordered[right - 1]).abs() < (ratio - ordered[right]).abs()
    source = places[torch.where(nearer, right - 1, right)]
    again = (source == source[0]).nonzero().flatten()
    head = int(again[1]) if len(again) > 1 else len(source)
    if len(factors) % head:
        return None
    channels = FoldChannels(len(factors) // head, len(source) // len(factors))
    expected = channels.expand(torch.arange(len(factors)))
    fits = torch.equal(source, expected) and _same(x * factors[source], before)
    return channels if fits else None


def _offset(asked: _Asked, smooth: str, factors: torch.Tensor) -> float | None:
    """What is added to the weight of ``smooth`` before it multiplies; None where no scale of its
    weight divides its output."""
    module: Any = asked.modules[smooth]
    if smooth in asked.calls:
        return 0.0
    call = asked.norms[smooth]
    for offset in (0.0, 1.0):
        with _copied([module]):
            _divide(module, factors, offset)
            output = _run(module, call.input, call.named, call.rest)
        if _same(output * factors, call.output):
            return offset
    return None


def _divide(module: Any, factors: torch.Tensor, offset: float) -> None:
    """Divide what a norm or a linear gives by factors (out,)."""
    weight = module.weight.data
    if offset:
        weight.add_(offset)
    weight.div_(factors if weight.dim() == 1 else factors[:, None])
    if offset:
        weight.sub_(offset)
    if getattr(module, "bias", None) is not None:
        module.bias.data.div_(factors)


def _writers(asked: _Asked, linears: Sequence[str]) -> dict[str, str]:
    """Linears that add to the residual stream, and what is given the stream before them."""
    delta = torch.randn(asked.hidden.shape, generator=_seeded(), dtype=torch.float64)
    moved: list[str] = []

    def watch(name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            before = asked.given.get(name)
            if before is not None and before.numel() == delta.numel() == inputs[0].numel():
                difference = inputs[0] - before
                if _same(difference, delta.view_as(difference)):
                    moved.append(name)

        return see

    # Where nothing that linears give changes, what moves with the block's input is the stream.
    hooks = [asked.modules[name].register_forward_pre_hook(watch(name)) for name in asked.given]
    asked.run(_ignore, hidden=asked.hidden + delta)
    for hook in hooks:
        hook.remove()
    order = list(asked.given)
    found = {}
    for name in linears:
        given = asked.calls[name].output
        before = [one for one in moved if order.index(one) < order.index(name)]
        if given.numel() != delta.numel() or not before:
            continue
        output = asked.run(_ignore, changed=name, change=lambda y: y + delta.view_as(y))
        if _same(output - asked.output, delta):
            found[name] = before[-1]
    return found


def _ignore(_name: str, _input: torch.Tensor) -> None:
    pass


def _expert(asked: _Asked, name: str) -> bool:
    parts = name.split(".")
    return any(
        isinstance(asked.modules[".".join(parts[:end])], Experts) for end in range(1, len(parts))
    )


def _of_all_experts(found: Structure, sizes: Mapping[str, int]) -> Structure:
    """What was found on the first experts of each mixture, said of all."""
    calls = _spread(found.calls, sizes)
    inputs = list(found.inputs)
    folds = []
    for group in found.inputs:
        inputs += [tuple(map(said, group)) for said in _others(group[0], sizes)]
    for fold in found.folds:
        of_others = list(_others(fold.smooth_layer, sizes))
        balance = fold.balance_layers if of_others else _spread(fold.balance_layers, sizes)
        folds.append(replace(fold, balance_layers=balance))
        folds += [
            replace(
                fold,
                smooth_layer=said(fold.smooth_layer),
                balance_layers=tuple(map(said, fold.balance_layers)),
                given=said(fold.given),
            )
            for said in of_others
        ]
    unfolded = dict(found.unfolded)
    for name, why in found.unfolded.items():
        unfolded |= {said(name): said(why) for said in _others(name, sizes)}
    return replace(
        found,
        calls=calls,
        inputs=tuple(sorted(inputs, key=lambda group: calls.index(group[0]))),
        folds=tuple(folds),
        unfolded=unfolded,
    )


def _others(name: str, sizes: Mapping[str, int]) -> Iterator[Callable[[str], str]]:
    """For each expert that was not asked, what turns the words of the last one into its own;
    none where ``name`` is not of the last one."""
    for mixture, size in sizes.items():
        last = f"{mixture}.{_ASKED_EXPERTS - 1}."
        if name.startswith(last):
            for number in range(_ASKED_EXPERTS, size):
                yield partial(_said, last=last, other=f"{mixture}.{number}.")


def _said(words: str, last: str, other: str) -> str:
    return words.replace(last, other)


def _spread(names: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """With those of the experts that were not asked."""
    every = [[said(name) for said in _others(name, sizes)] for name in names]
    more = (name for expert in zip_longest(*filter(None, every)) for name in expert if name)
    return (*names, *more)


@contextmanager
def _copied(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Give the modules weights of their own, which may be changed, and then the earlier ones
    again."""
    kept = [(one, one.data) for module in modules for one in module.parameters(recurse=False)]
    for parameter, data in kept:
        parameter.data = data.clone()
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextmanager
def _forwards(
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, _Call],
    meet: Callable[[str, torch.Tensor], None],
) -> Iterator[None]:
    """Modules give what they gave in ``calls``."""

    def known(name: str) -> Any:
        def forward(x: torch.Tensor, *_: Any, **__: Any) -> Any:
            meet(name, x)
            return calls[name].output

        return forward

    for name in calls:
        modules[name].forward = known(name)
    try:
        yield
    finally:
        for name in calls:
            del modules[name].forward


def _run(
    module: nn.Module,
    hidden: torch.Tensor,
    arguments: Mapping[str, Any],
    rest: tuple[Any, ...] = (),
) -> torch.Tensor:
    """What a module gives in float64, with tokens for each of its experts."""
    mixtures = [part for part in module.modules() if isinstance(part, Experts) and part.routed]
    hooks = [part.register_forward_pre_hook(_every_expert) for part in mixtures]
    try:
        with torch.no_grad(), _float64():
            output = module(hidden, *rest, **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    found: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def _every_expert(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tokens go to the experts in turn, whatever a router says."""
    hidden, chosen, *rest = inputs
    experts: Any = module
    turns = torch.arange(chosen.numel()).view_as(chosen) % len(experts)
    return (hidden, turns, *rest)


@contextmanager
def _float64() -> Iterator[None]:
    """Computes in float64, also what a module makes of no tensor."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)


class _Float64(TorchFunctionMode):
    """Computes in float64 where a module asks for less: norms and softmax do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        named = {key: _double(value) for key, value in (kwargs or {}).items()}
        return func(*map(_double, args), **named)


def _double(value: Any) -> Any:
    narrow = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if narrow else value


def _wide(value: Any) -> Any:
    """With every tensor of floats in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(map(_wide, value))
    return {k: _wide(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape:
        return False
    return bool((left - right).abs().max() <= _NEAR * right.abs().max())


def _factors(count: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Random, between ½ and 2."""
    drawn = torch.rand(count, generator=generator or _seeded(), dtype=torch.float64)
    return 2 ** (2 * drawn - 1)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
