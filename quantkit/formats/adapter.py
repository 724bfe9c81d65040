"""A LoRA adapter as PEFT writes it: its settings, and what it has for which module of its base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from quantkit.errors import CheckpointError, reading
from quantkit.models import dtypes, hub
from quantkit.models.checkpoint import ADAPTER
from quantkit.models.tensors import TensorInfo, tensors_of
from quantkit.system.files import sha256_files
from quantkit.system.json_file import read_object

if TYPE_CHECKING:
    import torch

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Ways to begin the training that leave the base's weights as they are."""
_UNSUPPORTED = (
    *("lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config", "megatron_config"),
)
"""Settings with which an adapter is more, or something else, than a product of two matrices."""
_PART = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A\.weight|lora_embedding_A)"
    r"|(?P<up>lora_B\.weight|lora_embedding_B)|(?P<magnitude>lora_magnitude_vector(\.weight)?))"
)


class Settings(BaseModel):
    """adapter_config.json, in PEFT's words; keys that training alone reads are left out."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None

    @classmethod
    def of(cls, path: Path) -> Settings:
        """Raise CheckpointError for settings that are unreadable or not supported."""
        file = path / ADAPTER
        if not file.is_file():
            raise CheckpointError(
                f"{path}: no {ADAPTER}; a LoRA adapter of PEFT has one, and {_WEIGHTS}"
            )
        try:
            found = cls.model_validate(read_object(file))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise CheckpointError(f"{file}: {where}: {problem['msg']}") from error
        if found.peft_type != "LORA":
            raise CheckpointError(
                f"{file}: peft_type is {found.peft_type}; quantkit merges LORA only: merge it with "
                "peft, and give the merged model"
            )
        unsupported = [key for key in _UNSUPPORTED if (found.model_extra or {}).get(key)]
        unsupported += ["bias"] if found.bias != "none" else []
        if isinstance(found.init_lora_weights, str):
            kept = found.init_lora_weights.lower() in _KEEPS_BASE
            unsupported += [] if kept else ["init_lora_weights"]
        for key in unsupported:
            value = getattr(found, key, None)
            raise CheckpointError(
                f"{file}: {key} is {value!r}, which quantkit does not merge: merge it with peft, "
                "and give the merged model"
            )
        return found

    def rank(self, module: str) -> int:
        """Of the update of a module."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """By what the product of the two matrices is multiplied."""
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class LowRank:
    """The update of one module: the names of ``down`` (rank, in), ``up`` (out, rank) and, of DoRA,
    of the ``magnitude`` (out) of each output; an embedding has a row for each input."""

    module: str
    down: str
    up: str
    magnitude: str | None
    scaling: float
    of_embedding: bool


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. ``replaced``: by the names of the base's tensors that it has whole, its
    own for them."""

    id: str
    path: Path
    revision: str | None
    settings: Settings
    tensors: Mapping[str, TensorInfo]
    updates: Mapping[str, LowRank]
    replaced: Mapping[str, str]

    @classmethod
    def open(cls, source: str | Path) -> Adapter:
        """Open a directory or a hub id ``org/name[@revision]``.

        Raise CheckpointError for what is not a LoRA that can be merged.
        """
        path = Path(source).expanduser()
        of_hub = not path.exists() and hub.names_hub(str(source))
        if not of_hub and not path.is_dir():
            raise CheckpointError(
                f"{source}: no such directory; an adapter is a directory or a hub id (org/name)"
            )
        path = hub.download_adapter(str(source)) if of_hub else path.absolute()
        settings = Settings.of(path)
        file = path / _WEIGHTS
        if not file.is_file():
            pickle = ", only adapter_model.bin, which is pickle and never loaded"
            there = pickle if (path / "adapter_model.bin").is_file() else ""
            raise CheckpointError(
                f"{path}: no {_WEIGHTS}{there}; save it with "
                "model.save_pretrained(DIR, safe_serialization=True)"
            )
        tensors = tensors_of([file])
        updates, replaced = _parts(file, tensors, settings)
        return cls(
            str(source).partition("@")[0] if of_hub else path.name,
            path,
            path.name if of_hub else None,
            settings,
            tensors,
            updates,
            replaced,
        )

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Digests of its two files, by their names."""
        digests = sha256_files([self.path / ADAPTER, self.path / _WEIGHTS])
        return {file.name: digest for file, digest in digests.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it is stored."""
        from safetensors import safe_open

        info = self.tensors[name]
        with reading(f"{info.shard}: {name}"), safe_open(info.shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def untouched(self, modules: Mapping[str, Any]) -> list[str]:
        """Modules that the settings name as its targets, and that it has nothing for."""
        targets = self.settings.target_modules
        narrowed = ("exclude_modules", "layers_to_transform")
        if targets is None or any((self.settings.model_extra or {}).get(key) for key in narrowed):
            return []

        def is_target(name: str) -> bool:
            if isinstance(targets, str):
                return bool(re.fullmatch(targets, name))
            return any(name == one or name.endswith(f".{one}") for one in targets)

        return [name for name in modules if is_target(name) and name not in self.updates]


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The first pattern decides that is the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _parts(
    file: Path, tensors: Mapping[str, TensorInfo], settings: Settings
) -> tuple[dict[str, LowRank], dict[str, str]]:
    """Updates by module, and whole tensors by the base's names."""
    found: dict[str, dict[str, str]] = {}
    replaced = {}
    for name, info in tensors.items():
        if not name.startswith(_PREFIX):
            raise CheckpointError(f"{file}: {name}: PEFT's names begin with {_PREFIX}")
        if info.dtype not in dtypes.WEIGHTS:
            raise CheckpointError(
                f"{file}: {name} is stored as {info.dtype}; expected {', '.join(dtypes.WEIGHTS)}"
            )
        inner = name.removeprefix(_PREFIX)
        part = _PART.fullmatch(inner)
        if part:
            kind = next(k for k in ("down", "up", "magnitude") if part[k])
            found.setdefault(part["module"], {})[kind] = name
        elif ".lora_" in inner or ".token_adapter." in inner:
            raise CheckpointError(
                f"{file}: {name} is nothing that quantkit merges: merge it with peft, and give the "
                "merged model"
            )
        else:
            plain = re.sub(r"\.(base_layer|modules_to_save)(?=\.\w+$)", "", inner)
            replaced[plain] = name
    updates = {one.module: one for one in _updates(file, found, tensors, settings)}
    if not updates and not replaced:
        raise CheckpointError(f"{file}: changes nothing")
    return updates, replaced


def _updates(
    file: Path,
    found: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, TensorInfo],
    settings: Settings,
) -> Iterator[LowRank]:
    for module, parts in found.items():
        wanted = ("down", "up", "magnitude") if settings.use_dora else ("down", "up")
        if set(parts) != set(wanted):
            raise CheckpointError(
                f"{file}: {module} has {', '.join(parts.values())} only, or too much; an update is "
                "lora_A, lora_B and with use_dora lora_magnitude_vector: get the adapter again"
            )
        down, up = (tensors[parts[kind]].shape for kind in ("down", "up"))
        rank = settings.rank(module)
        if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
            raise CheckpointError(
                f"{file}: {module}: lora_A {list(down)} and lora_B {list(up)} do not fit rank "
                f"{rank} of {ADAPTER}; only linears and embeddings are merged"
            )
        yield LowRank(
            module,
            parts["down"],
            parts["up"],
            parts.get("magnitude"),
            settings.scaling(module),
            parts["down"].endswith("lora_embedding_A"),
        )
