"""A checkpoint whose experts lie in stacks, as one that has a tensor for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.stored_names import Part, StoredNames
from quantkit.models.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(frozen=True, eq=False)
class Unstacked(Checkpoint):
    """``cuts``: by the names of tensors that ``stacked`` has in stacks, or turned, what it has, and
    the part of it. All else is as there."""

    stacked: Checkpoint = field(kw_only=True, repr=False)
    cuts: Mapping[str, tuple[str, Part]] = field(kw_only=True, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the dtype in which it is stored, on the CPU."""
        stack, part = self.cuts.get(name, (name, None))
        tensor = self.stacked.read(stack)
        return tensor if part is None or part.cut is None else part.cut(tensor).contiguous()

    @property
    def hf_config(self) -> PretrainedConfig:
        """As ``Checkpoint.hf_config``."""
        return self.stacked.hf_config


def unstacked(checkpoint: Checkpoint, model: Any) -> Checkpoint:
    """The checkpoint as ``model``, a model of transformers with its experts apart, has it."""
    import torch

    names = StoredNames.of(model, checkpoint.tensors)
    cuts: dict[str, tuple[str, Part]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        parts = [part for part in names.parts_of(name) or () if part.cut is not None]
        if not parts:
            tensors[name] = info
        outline = torch.empty(info.shape, device="meta") if parts else None
        for part in parts:
            assert part.cut is not None
            assert outline is not None
            shape = tuple(part.cut(outline).shape)
            own = part.name if len(parts) > 1 else name
            cuts[own] = name, part
            tensors[own] = TensorInfo(own, info.dtype, shape, info.shard)
    if not cuts:
        return checkpoint
    known: dict[str, Any] = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    return Unstacked(**known | {"tensors": tensors}, stacked=checkpoint, cuts=cuts)


def stacks_of(checkpoint: Checkpoint, names: Iterable[str]) -> set[str]:
    """The stored tensors that hold these."""
    cuts = checkpoint.cuts if isinstance(checkpoint, Unstacked) else {}
    return {cuts[name][0] if name in cuts else name for name in names}
