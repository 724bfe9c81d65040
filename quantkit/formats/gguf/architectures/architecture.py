"""What there is to say about an architecture: its modules, its metadata, and what it cannot do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Config = dict[str, Any]
"""A model's configuration under the names that ``config.resolve`` gives it."""

Transform = Callable[["torch.Tensor", Config], "torch.Tensor"]
"""From a checkpoint's tensor to llama.cpp's; works on the meta device too."""


@dataclass(frozen=True)
class Module:
    """A module of the checkpoint and what llama.cpp calls it.

    ``source``: inside a block where it belongs to one; ``*`` stands for an index, and llama.cpp
    has all modules that differ in it as one tensor. ``shape``: of the checkpoint's weight, as
    names of sizes in a ``Config`` or products of them (``3*hidden_size hidden_size``); that of
    ``*`` comes first. ``bias``: whether it has one, or the key of the config that says so.
    ``when``: the key that says whether it is there; ``!key`` for one that says that it is not.
    ``optional``: the key that says that it need not be there. ``alone``: it is one tensor, not a
    module, and both names are whole: no ``.weight`` follows.
    """

    source: str
    name: str
    shape: str
    transform: Transform | None = None
    bias: bool | str = False
    when: str = ""
    optional: str = ""
    alone: bool = False


@dataclass(frozen=True)
class Architecture:
    """A model family in llama.cpp, whose name for it is ``name``.

    ``outer`` and ``block`` are its modules outside and inside the blocks, which the checkpoint
    calls ``blocks`` and a number. ``keys``: its metadata, as GGUFWriter's methods without their
    ``add_``, in the order of llama.cpp's converter; ``values``: by the same names, what is not in
    the config as such. ``computes``: by keys of the config, the value or values that llama.cpp
    computes, or a function of the config that gives them. ``rope_types``: those it knows here.
    ``ignored``: patterns, as a shell's, of the names of tensors that it does not need.
    """

    name: str
    outer: tuple[Module, ...]
    block: tuple[Module, ...]
    keys: str
    blocks: str = "model.layers."
    values: Callable[[Config], dict[str, Any]] = lambda _: {}
    computes: Mapping[str, Any] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default",)
    ignored: tuple[str, ...] = ()
    sliding_window: bool = False
    """Whether llama.cpp attends to a window only, where the model does."""
