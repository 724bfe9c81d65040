"""What checkpoints call the tensors of transformers' modules, where they call them otherwise.

transformers itself is asked: it says how it renames what it loads, and which stacks it makes of
experts that are stored one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NUMBER = re.compile(r"\.(\d+)\.(?!.*\.\d+\.)")
"""The last one of a name: an expert's."""


@dataclass(frozen=True)
class Part:
    """A tensor of the model as what it is of a stored one; ``cut`` takes it out of a stack."""

    name: str
    cut: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True)
class StoredNames:
    """The names of one model in its checkpoint: ``stored(name)`` for a tensor of the model.

    ``converted``: tensors that are stored in a way that only transformers computes from.
    """

    names: Mapping[str, str]
    dropped: str
    """What names in the checkpoint lack at their front."""
    parts_of: Callable[[str], list[Part] | None]
    """What of the model a stored tensor holds; None of what transformers converts."""
    converted: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, model: Any, tensors: Iterable[str]) -> StoredNames:
        """Of a model of transformers in a checkpoint with these tensors.

        Where its experts are apart, modules say by ``stacks`` what transformers makes of them.
        """
        tensors = list(tensors)
        base = f"{model.base_model_prefix}."
        parts_of = partial(_parts, _Loading.of(model))
        found = {name: parts_of(name) for name in tensors}
        names = {
            part.name: name
            for name, parts in found.items()
            for part in parts or ()
            if part.cut is None
        }
        # Checkpoints that were saved without their head lack the prefix: OpenAI's GPT-2.
        dropped = "" if any(name.startswith(base) for name in tensors) else base
        converted = tuple(name for name, parts in found.items() if parts is None)
        return cls(names, dropped, parts_of, converted)

    def __call__(self, name: str) -> str:
        """What the checkpoint calls the model's tensor ``name``, or would, had it one."""
        return self.names.get(name) or name.removeprefix(self.dropped)


@dataclass(frozen=True)
class _Loading:
    """How transformers loads a model: in its own words."""

    renamings: list[Any]
    converters: list[Any]
    base: str
    slots: Mapping[str, Any]
    """By the names of the model's tensors; of experts that are apart, of the stacks as well."""
    stacks: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any) -> _Loading:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        steps = get_model_conversion_mapping(model)
        stacks = {
            f"{name}.{leaf}": stack
            for name, module in model.named_modules()
            for leaf, stack in getattr(module, "stacks", {}).items()
        }
        return cls(
            [step for step in steps if isinstance(step, WeightRenaming)],
            [step for step in steps if isinstance(step, WeightConverter)],
            model.base_model_prefix,
            {**model.state_dict(), **stacks},
            stacks,
        )


def _parts(loading: _Loading, stored: str) -> list[Part] | None:
    from transformers.core_model_loading import rename_source_key

    if stored in loading.slots and stored not in loading.stacks:
        return [Part(stored)]
    target, pattern = rename_source_key(
        stored, loading.renamings, loading.converters, loading.base, loading.slots
    )
    stack = loading.stacks.get(target)
    holder = target.rpartition(".")[0]
    if pattern is None:
        if stack is None:
            return [Part(target)]
        return [Part(f"{holder}.{name}", cut) for name, cut in stack.cuts()]
    step = next(one for one in loading.converters if pattern in one.source_patterns)
    number = _NUMBER.search(stored)
    if stack is None or number is None or len(step.source_patterns) != len(stack.parts):
        return None
    part = stack.parts[step.source_patterns.index(pattern)]
    return [Part(f"{holder}.{number[1]}.{part}")]


def is_ignored(model: Any, name: str) -> bool:
    """Whether transformers loads the model without this tensor of the checkpoint, and says
    nothing."""
    patterns = ("rotary_emb.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ()))
    return any(re.search(pattern, name) for pattern in patterns)


def parts(names: StoredNames, tensors: Iterable[str]) -> Iterator[tuple[str, Part]]:
    """Each stored tensor, and each part of the model in it."""
    for name in tensors:
        for part in names.parts_of(name) or ():
            yield name, part
