"""Packed checkpoints on disk, ours or others': what they say they are, and unpacking them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint, TensorInfo
from quantkit.errors import CheckpointError, IncompatibleVariant

if TYPE_CHECKING:
    import torch

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_WORDS = (".qweight", ".weight_packed")
"""How the names of packed integers end: GPTQ and AWQ, compressed-tensors."""
_METHODS = {
    "gptq": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed-tensors",
    "auto-round": "auto-round",
    "intel/auto-round": "auto-round",
}
"""Values of ``quant_method`` that are read; an AutoRound file is of one of the formats."""


@dataclass(frozen=True)
class Quantization:
    """What a packed checkpoint's config.json says of it.

    ``format``: which of quantkit's formats its tensors have. ``config``: the quantization_config.
    """

    path: Path
    format: str
    scheme: str
    config: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> Quantization | None:
        """None where there is no config.json, or it speaks of no quantization.

        Raise IncompatibleVariant for a method that quantkit does not read.
        """
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            return None
        found = config.get("quantization_config") if isinstance(config, dict) else None
        if not isinstance(found, dict):
            return None
        method = found.get("quant_method")
        if method not in _METHODS:
            raise IncompatibleVariant(
                f"{path}: quant_method is {method!r}; quantkit reads "
                f"{', '.join(map(repr, _METHODS))}, and safetensors that are not quantized"
            )
        format_ = _METHODS[method]
        if format_ == "auto-round":
            format_ = "awq" if "awq" in packing(found) else "gptq"
        return cls(path, format_, _scheme(found), found)

    @classmethod
    def opened(cls, path: Path) -> Quantization:
        """Raise CheckpointError where there is none."""
        found = cls.of(path)
        if found is None:
            raise CheckpointError(f"{path}: its config.json has no quantization_config")
        return found

    def require(self, key: str, *values: Any) -> None:
        """Raise IncompatibleVariant where the key is there and has none of these values."""
        if self.config.get(key, values[0]) not in values:
            raise IncompatibleVariant(
                f"{self.path}: {key} is {self.config[key]!r}; quantkit unpacks "
                f"{', '.join(map(repr, values))}"
            )


def packing(config: Mapping[str, Any]) -> str:
    """How AutoRound says that it packed: ``auto_round:auto_gptq``; once as ``backend``."""
    return str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq")


def _scheme(config: Mapping[str, Any]) -> str:
    """``w4g128``; of several groups of layers (compressed-tensors) the first one's."""
    groups = config.get("config_groups")
    if isinstance(groups, dict) and groups:
        config = next(iter(groups.values())).get("weights") or {}
    size = config.get("group_size")
    return f"w{config.get('bits', config.get('num_bits'))}g{-1 if size is None else size}"


def linears_of(tensors: Iterable[str]) -> list[str]:
    """Names of the packed linears, without the ends of their tensors' names."""
    return [name.rpartition(".")[0] for name in tensors if name.endswith(_WORDS)]


def tensor_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of the data of tensors."""
    return sum(math.prod(info.shape) * _BYTES[info.dtype] for info in tensors)


def bits_of(tensors: Mapping[str, TensorInfo], source: Checkpoint) -> tuple[float, float | None]:
    """Bits per weight of all tensors, and of the packed linears alone.

    None for those where there are none, or under other names than the source's.
    """
    everything = tensor_bytes(tensors.values()) * 8 / source.parameters
    linears = set(linears_of(tensors))
    weights = [source.tensors.get(f"{name}.weight") for name in linears]
    known = [info.numel for info in weights if info is not None]
    if not linears or len(known) < len(weights):
        return everything, None
    parts = (
        info
        for name, info in tensors.items()
        if name.rpartition(".")[0] in linears and not name.endswith(".bias")
    )
    return everything, tensor_bytes(parts) * 8 / sum(known)


def unpack_linears(
    directory: Path,
    parts: tuple[str, ...],
    optional: tuple[str, ...],
    unpack: Callable[..., torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain state dict of a packed checkpoint, tensor by tensor.

    A linear is stored as ``NAME.part`` for each of ``parts``, and some of ``optional``.
    ``unpack(*parts, **optional)`` gives its (out, in) float32 weight, yielded as ``NAME.weight``;
    what is not there is None. Everything else is yielded as it is.
    """
    packed = Checkpoint.open(directory)
    first, *_ = parts
    for name in packed.tensors:
        stem, _, part = name.rpartition(".")
        if part == first:
            missing = [p for p in parts if f"{stem}.{p}" not in packed.tensors]
            if missing:
                raise CheckpointError(f"{directory}: {stem} has no {', '.join(missing)}")
            needed = [packed.read(f"{stem}.{p}") for p in parts]
            there = {p: f"{stem}.{p}" in packed.tensors for p in optional}
            others = {p: packed.read(f"{stem}.{p}") if there[p] else None for p in optional}
            try:
                yield f"{stem}.weight", unpack(*needed, **others)
            except (RuntimeError, IndexError, ZeroDivisionError) as error:
                shapes = ", ".join(
                    f"{p} {list(t.shape)}" for p, t in zip(parts, needed, strict=True)
                )
                raise CheckpointError(
                    f"{directory}: {stem}: its parts do not fit together ({shapes}): {error}"
                ) from error
        elif part not in (*parts, *optional):
            yield name, packed.read(name)


def packed_facts(directory: Path) -> dict[str, Any]:
    """What `inspect` says of a packed checkpoint."""
    packed = Checkpoint.open(directory)
    return {
        "architecture": packed.architecture,
        "context_length": packed.config.get("max_position_embeddings"),
        "tensors": len(packed.tensors),
        "quantized_linears": len(linears_of(packed.tensors)),
        "bytes": tensor_bytes(packed.tensors.values()),
        "quantization_config": packed.config["quantization_config"],
    }
