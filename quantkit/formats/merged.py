"""A base with a LoRA adapter merged into it, read one tensor at a time.

The arithmetic is that of PEFT's ``merge_and_unload`` on a CPU, to the last bit: float32, whatever
the adapter is stored in, rounded once to the base's dtype; the update of an embedding is rounded to
it before it is added, as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, reading
from quantkit.formats.adapter import Adapter, LowRank
from quantkit.formats.decoded import open_decoded
from quantkit.models import dtypes, hub
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.merge_record import MergeRecord, PartRecord
from quantkit.models.stored_names import StoredNames
from quantkit.models.text_part import text_config

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class _Change:
    """Of one tensor of the base. ``whole``: the adapter's tensor in its place; ``update``: what is
    then added; ``turned``: whether it is stored as (in, out)."""

    whole: str | None = None
    update: LowRank | None = None
    turned: bool = False


@dataclass(frozen=True, eq=False)
class Merged(Checkpoint):
    """What the merge will give: for plans, and to be written (``producers.merge``).

    Its weights are in no file yet, so nothing can load it.
    """

    base: Checkpoint = field(kw_only=True, repr=False)
    adapter: Adapter = field(kw_only=True, repr=False)
    changes: Mapping[str, _Change] = field(kw_only=True, repr=False)

    @classmethod
    def of(cls, base: Checkpoint, adapter: Adapter) -> Merged:
        """Raise CheckpointError where the adapter is not one of this base."""
        model = _outline(base)
        changes = _changes(base, adapter, model)
        known: dict[str, Any] = {f.name: getattr(base, f.name) for f in fields(Checkpoint)}
        names = [_name(base), adapter.id.rpartition("/")[2]]
        origin = f"{base.id} with the LoRA adapter {adapter.id} merged into it"
        told = f"{origin}; {base.id}: {base.origin}" if base.origin else origin
        known |= {
            "id": "-".join(names),
            "revision": None,
            "origin": told,
            "notes": (origin, *_notes(base, adapter, dict(model.named_modules()))),
            "quantized": None,
        }
        return cls(**known, base=base, adapter=adapter, changes=changes)

    @property
    def weights(self) -> Path:
        """None: it is to be written first."""
        raise CheckpointError(f"{self.id}: is not written yet, so no engine can load it")

    @cached_property
    def sha256(self) -> dict[str, str]:
        """None: likewise."""
        raise CheckpointError(f"{self.id}: is not written yet, so its files have no digests")

    @cached_property
    def record(self) -> MergeRecord:
        """What is written beside the weights; hashes the files of both."""
        parts = [
            PartRecord(id=one.id, revision=one.revision, sha256=one.sha256)
            for one in (self.base, self.adapter)
        ]
        return MergeRecord(
            base=parts[0], adapter=parts[1], origin=self.origin or "", notes=list(self.notes)
        )

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """The base's."""
        return self.base.hf_config

    def read(self, name: str) -> torch.Tensor:
        """One tensor, merged, in the dtype of the base's.

        Raise CheckpointError where it has become infinite or NaN.
        """
        change = self.changes.get(name)
        if change is None:
            return self.base.read(name)
        dtype = self.tensors[name].torch_dtype
        weight = self.adapter.read(change.whole) if change.whole else self.base.read(name)
        weight = weight.to(dtype)
        if change.update:
            weight = self._updated(weight, change.update, turned=change.turned)
        if not weight.isfinite().all():
            raise CheckpointError(
                f"{self.adapter.path}: merged into {name} of {self.base.id} it gives NaN or values "
                f"beyond {dtype}: the adapter is bad, or needs a base of another dtype"
            )
        return weight

    def _updated(self, weight: torch.Tensor, update: LowRank, *, turned: bool) -> torch.Tensor:
        """``weight`` and the update, in PEFT's order of operations."""
        import torch

        def oriented(matrix: torch.Tensor) -> torch.Tensor:
            return matrix.T if turned else matrix

        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        down, up = (self.adapter.read(name).to(wide) for name in (update.down, update.up))
        delta = oriented(up @ down) * update.scaling
        if update.magnitude is not None:  # DoRA, arXiv 2402.09353
            norm = torch.linalg.norm(oriented(weight) + oriented(delta), dim=1)
            factor = self.adapter.read(update.magnitude).to(wide) / norm
            return (oriented(factor.view(-1, 1)) * (weight + delta)).to(weight.dtype).contiguous()
        if update.of_embedding:
            delta = delta.to(weight.dtype)
        return (weight + delta).to(weight.dtype).contiguous()


def open_merged(base: str | Path, adapter: str | Path) -> Merged:
    """Open both; raise CheckpointError where one cannot be read, or they do not fit together."""
    opened = Adapter.open(adapter)
    return Merged.of(open_decoded(base), opened)


def _name(base: Checkpoint) -> str:
    return base.id.rpartition("/")[2] if base.revision else base.path.name


def _outline(base: Checkpoint) -> Any:
    """The base as transformers builds it, without weights: it knows what its modules are."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = base.hf_config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        config = text_config(base)
    with reading(base.path / "config.json"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _changes(base: Checkpoint, adapter: Adapter, model: Any) -> dict[str, _Change]:
    """By the names of the base's tensors."""
    from transformers.pytorch_utils import Conv1D

    stored = StoredNames.of(model, base.tensors)
    modules = dict(model.named_modules())
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}

    def place(name: str, shape: tuple[int, ...]) -> str:
        if name in tied:
            raise CheckpointError(
                f"{adapter.path}: changes {name}, which in {base.id} is tied: a merge would change "
                "input embedding and output layer alike, and training changed one of them; give a "
                "base that stores both (tie_word_embeddings false)"
            )
        found = name if name in base.tensors else stored(name)
        if found not in base.tensors:
            raise CheckpointError(
                f"{adapter.path}: changes {name}, which {base.id} has not: it is an adapter of "
                f"another model ({adapter.settings.base_model_name_or_path or 'not named'})"
            )
        info = base.tensors[found]
        if info.shape != shape:
            raise CheckpointError(
                f"{adapter.path}: its {name} is {list(shape)}, that of {base.id} is "
                f"{list(info.shape)}: it is an adapter of another model "
                f"({adapter.settings.base_model_name_or_path or 'not named'})"
            )
        if info.dtype not in dtypes.WEIGHTS:
            raise CheckpointError(
                f"{info.shard}: {found} is stored as {info.dtype}, into which nothing is merged; "
                "give a base that is not quantized"
            )
        return found

    changes: dict[str, _Change] = {}
    for name, own in adapter.replaced.items():
        changes[place(name, adapter.tensors[own].shape)] = _Change(whole=own)
    for module, update in adapter.updates.items():
        turned = update.of_embedding or isinstance(modules.get(module), Conv1D)
        outputs = adapter.tensors[update.up].shape[0]
        inputs = adapter.tensors[update.down].shape[1]
        shape = (inputs, outputs) if turned else (outputs, inputs)
        if update.magnitude and adapter.tensors[update.magnitude].shape != (outputs,):
            raise CheckpointError(
                f"{adapter.path}: {update.magnitude} is "
                f"{list(adapter.tensors[update.magnitude].shape)}, expected [{outputs}]"
            )
        name = place(f"{module}.weight", shape)
        before = changes.get(name, _Change())
        changes[name] = _Change(before.whole, update, turned)
    return changes


def _notes(base: Checkpoint, adapter: Adapter, modules: Mapping[str, Any]) -> list[str]:
    """What a reader should know beside that it is merged."""
    notes = list(base.notes)
    if base.quantized:
        notes[-1] = (
            f"the base is quantized ({base.quantized}): it was decoded to {base.scheme} before the "
            "adapter was merged into it, and drift is measured against the merged model"
        )
    if untouched := adapter.untouched(modules):
        notes.append(
            f"the adapter has nothing for {len(untouched)} of the modules that it names as its "
            f"targets, {untouched[0]} for one: is it one of this base?"
        )
    named = adapter.settings.base_model_name_or_path
    if named and Path(named).name.casefold() != _name(base).casefold():
        notes.append(f"the adapter says that its base is {named}")
    own = [path for pattern in hub.SIDECARS for path in sorted(adapter.path.glob(pattern))]
    other = [
        str(file.relative_to(adapter.path))
        for file in own
        if not (beside := base.path / file.relative_to(adapter.path)).is_file()
        or beside.read_bytes() != file.read_bytes()
    ]
    if other:
        notes.append(f"the base's files are taken, not the adapter's own {', '.join(other)}")
    return notes
