"""Which safetensors files of a directory are the model's: those that transformers takes.

``from_pretrained`` prefers ``model.safetensors`` to an index, and looks at nothing else
(``transformers.modeling_utils._get_resolved_checkpoint_files``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError
from quantkit.system.json_file import read_object

NAMED = "transformers_weights"
"""The key of a config.json that names the file or index to load."""
ONLY = "model.safetensors"
INDEX = f"{ONLY}.index.json"
NOT_OF_THE_MODEL = (
    "consolidated*.safetensors",  # the same weights under Mistral's own names
    "adapter*.safetensors",  # a LoRA
    "*.fp16*.safetensors",  # the same weights in another type
    "*.bf16*.safetensors",
    "*.fp32*.safetensors",
)
"""Patterns of files that lie beside the weights of many checkpoints and are never loaded."""


@dataclass(frozen=True)
class WeightFiles:
    """``files``: the safetensors, in the order in which they are read; ``index``: where one named
    them. ``aside``: names of the other weights in the directory."""

    files: tuple[Path, ...]
    index: Path | None
    aside: tuple[str, ...]

    @property
    def note(self) -> str | None:
        """What a reader should know; None where nothing is left aside."""
        if not self.aside:
            return None
        taken = self.index.name if self.index else self.files[0].name
        some = ", ".join(self.aside[:3]) + " …" * (len(self.aside) > 3)
        return f"weights are read from {taken}, as by transformers; ignored: {some}"


def find(directory: Path, config: Mapping[str, Any] | None = None) -> WeightFiles:
    """The weights of a checkpoint; ``config``: its config.json, which may name the file.

    Where transformers finds none, as in some packed checkpoints, all safetensors are taken but
    those that are known to be something else. Raise CheckpointError where there are none.
    """
    named = (config or {}).get(NAMED)
    chosen = directory / str(named or (ONLY if (directory / ONLY).is_file() else INDEX))
    if chosen.parent == directory and chosen.is_file():
        of_index = chosen.name.endswith(".index.json")
        files = _of_index(chosen) if of_index else [chosen]
        return _found(directory, files, chosen if of_index else None)
    if named:
        raise CheckpointError(f"{chosen}: no such file; config.json names it as {NAMED}")
    others = sorted(directory.glob("*.safetensors"))
    files = [f for f in others if not any(fnmatch(f.name, p) for p in NOT_OF_THE_MODEL)]
    if files:
        return _found(directory, files, None)
    if others:
        raise CheckpointError(
            f"{directory}: no {ONLY} or shards of it; {others[0].name}, which is "
            "there, is not what transformers loads as this model"
        )
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{directory}: no safetensors, only {', '.join(sorted(pickles)[:3])}, which may be "
            "pickle and is never loaded; get the safetensors, or save them with "
            "model.save_pretrained(..., safe_serialization=True) where you trust the file"
        )
    raise CheckpointError(f"{directory}: no safetensors; expected {ONLY} or its shards")


def _found(directory: Path, files: Sequence[Path], index: Path | None) -> WeightFiles:
    taken = {index, *files}
    there = [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]
    aside = sorted(file.name for file in there if file not in taken)
    return WeightFiles(tuple(files), index, tuple(aside))


def _of_index(index: Path) -> list[Path]:
    """The shards that an index names; raise CheckpointError where one is no file beside it."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: no weight_map, which says where each tensor is")
    for tensor, name in places.items():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise CheckpointError(
                f"{index}: {tensor} is in {name!r}, expected the name of a file beside the index"
            )
    files = [index.parent / name for name in sorted(set(places.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; {index.name} names it: download it")
    return files
