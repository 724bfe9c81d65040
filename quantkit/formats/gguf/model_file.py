"""A GGUF model on disk: one file, or the parts that together are one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError
from quantkit.formats.gguf.header import Header, read_header
from quantkit.models.gguf_files import holds_gguf, is_gguf

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""How llama.cpp names the parts, and by which it finds the others."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: ``type`` is ggml's number, its data begin ``start`` bytes into ``file``."""

    name: str
    shape: tuple[int, ...]
    type: int
    file: Path
    start: int


@dataclass(frozen=True)
class ModelFile:
    """An opened GGUF: ``files`` are its parts in order, ``missing`` the names of absent ones."""

    files: tuple[Path, ...]
    headers: tuple[Header, ...]
    missing: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> ModelFile:
        """Read the heads of all parts, given the first.

        Raise CheckpointError where a part is unreadable or ``path`` is not the first.
        """
        header = read_header(path)
        count = header.metadata.get("split.count", 1)
        index = header.metadata.get("split.no", 0)
        if not isinstance(count, int) or not isinstance(index, int) or not 0 <= index < count:
            raise CheckpointError(f"{path}: split.no {index!r} of split.count {count!r} parts")
        if count == 1:
            return cls((path,), (header,))
        paths = _parts(path, index, count)
        present = tuple(part for part in paths if part.is_file())
        headers = (header, *(read_header(part) for part in present[1:]))
        return cls(present, headers, tuple(p.name for p in paths if p not in present))

    @property
    def name(self) -> str:
        """The file's name, without a part's number."""
        match = _PART.fullmatch(self.files[0].name) if len(self.headers) > 1 else None
        return match["stem"] if match else self.files[0].stem

    @property
    def metadata(self) -> dict[str, Any]:
        """All but the later parts' own, which say which part they are."""
        return self.headers[0].metadata

    @property
    def architecture(self) -> str | None:
        """llama.cpp's name of it: ``llama``."""
        return self.metadata.get("general.architecture")

    def array(self, key: str) -> list[Any]:
        """The array of metadata under ``key``; empty where there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, list) else []

    @cached_property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Those of all parts, in file order."""
        return tuple(
            StoredTensor(t.name, t.shape, t.type, file, header.data_offset + t.offset)
            for file, header in zip(self.files, self.headers, strict=True)
            for t in header.tensors
        )

    @property
    def bytes(self) -> int:
        """Bytes of all parts on disk."""
        return sum(file.stat().st_size for file in self.files)


def gguf_at(path: Path) -> Path | None:
    """The GGUF that ``path`` is, or the only model in a directory that has no safetensors.

    Raise CheckpointError for a directory of several models.
    """
    if not holds_gguf(path):
        return None
    if path.is_file():
        return path
    found = [file for file in sorted(path.iterdir()) if is_gguf(file)]
    if len(found) > 1:
        found = _models(found)
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path}: holds {len(found)} models; name one of {names}")
    return found[0] if found else None


def _models(files: Sequence[Path]) -> list[Path]:
    """Those that are whole models, or the first part of one: no projector, matrix or adapter."""
    found = []
    for file in files:
        metadata = read_header(file).metadata
        is_model = metadata.get("general.type", "model") == "model"
        is_first = metadata.get("split.no", 0) == 0
        if is_model and is_first and metadata.get("general.architecture") != "clip":
            found.append(file)
    return found


def group_of(name: str) -> str:
    """What a tensor is called in every block: ``blk.*.attn_q.weight``."""
    return re.sub(r"\.\d+\.", ".*.", name)


def type_name(kind: int) -> str:
    """In ggml's words, ``Q4_K``; ``type 99`` for one that llama.cpp does not know."""
    from quantkit.formats.gguf import ggml

    known = ggml.numbered(kind)
    return known.name if known else f"type {kind}"


def stored_bytes(tensor: StoredTensor) -> int:
    """What the tensor's data take, without padding.

    Raise CheckpointError for a type that this version of llama.cpp does not know.
    """
    from quantkit.formats.gguf import ggml

    kind = ggml.numbered(tensor.type)
    if kind is None:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} has tensor type {tensor.type}, which this version of "
            "llama.cpp does not know"
        )
    return math.prod(tensor.shape) // kind.block * kind.bytes


def read_bytes(tensor: StoredTensor) -> NDArray[np.uint8]:
    """The tensor's data as they are stored, mapped, not read.

    Raise CheckpointError where the file ends before them.
    """
    import numpy as np

    size = stored_bytes(tensor)
    if tensor.start + size > tensor.file.stat().st_size:
        raise CheckpointError(
            f"{tensor.file}: ends inside the data of {tensor.name}; download it again"
        )
    if size == 0:
        return np.empty(0, np.uint8)
    # "c": as if it could be written to, which torch insists on; nothing is.
    return np.memmap(tensor.file, np.uint8, mode="c", offset=tensor.start, shape=(size,))


def _parts(path: Path, index: int, count: int) -> list[Path]:
    """All parts of the file whose first is ``path``; raise CheckpointError where it is another."""
    match = _PART.fullmatch(path.name)
    named = match and (int(match["number"]), int(match["count"])) == (index + 1, count)
    if match is None or not named:
        raise CheckpointError(
            f"{path}: is part {index + 1} of {count} by its metadata; llama.cpp finds the others "
            f"by names like model-{index + 1:05d}-of-{count:05d}.gguf: rename the parts so"
        )
    parts = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    if index:
        raise CheckpointError(
            f"{path}: is part {index + 1} of {count}; give the first, {parts[0].name}"
        )
    return parts
