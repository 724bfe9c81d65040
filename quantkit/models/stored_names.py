"""What checkpoints call the tensors of transformers' modules, where they call them otherwise.

transformers itself is asked: it says how it renames what it loads, and which stacks it makes of
experts that are stored one by one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_NUMBER = re.compile(r"\.(\d+)\.(?!.*\.\d+\.)")
"""The last one of a name: an expert's."""
_ENOUGH = 64
"""Names by which a prefix is found."""


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
    place: Place
    parts_of: Callable[[str], list[Part] | None]
    """What of the model a stored tensor holds: nothing where it lies beside the model; None of what
    transformers converts."""
    converted: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, model: Any, tensors: Iterable[str]) -> StoredNames:
        """Of a model of transformers in a checkpoint with these tensors.

        Where its experts are apart, modules say by ``stacks`` what transformers makes of them.
        """
        tensors = list(tensors)
        place = Place.of(model, set(tensors))
        loading = _Loading.of(model)

        def parts_of(stored: str) -> list[Part] | None:
            inside = place.inside(stored)
            return [] if inside is None else _parts(loading, inside)

        found = {name: parts_of(name) for name in tensors}
        names = {
            part.name: name
            for name, parts in found.items()
            for part in parts or ()
            if part.cut is None
        }
        converted = tuple(name for name, parts in found.items() if parts is None)
        return cls(names, place, parts_of, converted)

    def __call__(self, name: str) -> str:
        """What the checkpoint calls the model's tensor ``name``, or would, had it one."""
        return self.names.get(name) or self.place.outside(name)

    def beside(self, tensors: Iterable[str]) -> list[str]:
        """Those of a checkpoint's tensors that are of another part than the language model: of what
        sees or hears; none where it is the whole."""
        return [name for name in tensors if self.place.inside(name) is None]


@dataclass(frozen=True)
class Place:
    """Where in a checkpoint's names a model is. ``base``: what precedes the decoder's names in the
    model (``model.``). ``stored_base``: what precedes them in the checkpoint: nothing where it was
    saved without its head, ``language_model.model.`` or the like where the model is a part of it.
    ``stored_head``: what then precedes the names of all else, the output layer's."""

    base: str
    stored_base: str
    stored_head: str = ""

    @classmethod
    def of(cls, model: Any, tensors: Collection[str]) -> Place:
        """Found by the names of tensors that the model and the checkpoint share."""
        base = f"{model.base_model_prefix}."
        names = list(model.state_dict())
        inner = [name.removeprefix(base) for name in names if name.startswith(base)]
        outer = [name for name in names if not name.startswith(base)]
        if any(base + name in tensors for name in inner):
            return cls(base, base)
        # Checkpoints that were saved without their head lack the prefix: OpenAI's GPT-2.
        if any(name in tensors for name in inner):
            return cls(base, "")
        stored = _common_prefix(inner, tensors) or base
        return cls(base, stored, _common_prefix(outer, tensors) or "")

    @property
    def is_part(self) -> bool:
        """Whether other parts lie beside the model."""
        return self.stored_base not in ("", self.base)

    def inside(self, stored: str) -> str | None:
        """The name of a stored tensor in a checkpoint of the model alone; None of one beside it."""
        if not self.is_part:
            return stored
        if stored.startswith(self.stored_base):
            return self.base + stored.removeprefix(self.stored_base)
        head = f"{self.stored_head}lm_head."
        return stored.removeprefix(self.stored_head) if stored.startswith(head) else None

    def outside(self, name: str) -> str:
        """The other way round."""
        if name.startswith(self.base):
            return self.stored_base + name.removeprefix(self.base)
        return self.stored_head + name


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


def roots(beside: Iterable[str], text: str) -> list[str]:
    """The names of the parts that tensors beside the language model belong to: ``vision_tower``;
    ``text``: a name inside the language model."""
    found = {}
    for name in beside:
        ours, theirs = name.split("."), text.split(".")
        shared = 0
        while ours[shared] == theirs[shared] and shared + 1 < min(len(ours), len(theirs)):
            shared += 1
        found[ours[shared]] = True
    return list(found)


def _common_prefix(wanted: list[str], names: Collection[str]) -> str | None:
    """What precedes most of ``wanted`` in ``names``; None where nothing does."""
    counted = Counter(
        name.removesuffix(one)
        for one in wanted[:_ENOUGH]
        for name in names
        if name.endswith(f".{one}")
    )
    return max(counted, key=lambda prefix: counted[prefix]) if counted else None


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
