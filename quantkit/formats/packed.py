"""Packed checkpoints on disk, ours or others': what they say they are, and unpacking them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, ConversionError, IncompatibleVariant
from quantkit.formats.safetensors_files import Safetensors, opened
from quantkit.models.checkpoint import Checkpoint, refuse_adapter
from quantkit.models.tensors import TensorInfo, tensors_in
from quantkit.models.variant import SETTINGS, Model, Variant
from quantkit.system.json_file import read_object

if TYPE_CHECKING:
    import torch

_QUANTIZED = (".qweight", ".weight_scale")
"""How the name of one tensor of each quantized linear ends: GPTQ and AWQ, compressed-tensors."""
_METHODS = {
    "gptq": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed-tensors",
    "auto-round": "auto-round",
    "intel/auto-round": "auto-round",
}
"""Values of ``quant_method`` that are read; an AutoRound file is of one of the formats."""
_SOURCES = ("fp8", "fbgemm_fp8", "mxfp4")
"""Values of ``quant_method`` in which models are released: sources, decoded as they are read."""
_BESIDE = dict(zip(SETTINGS, ("gptq", "awq"), strict=True))
"""The format of each settings file that may lie beside config.json."""
_AUTOAWQ_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}


@dataclass(frozen=True)
class Quantization:
    """What a packed checkpoint says of itself.

    ``format``: which of quantkit's formats its tensors have. ``config``: its quantization_config,
    in ``file``: config.json, or beside it what AutoGPTQ or AutoAWQ wrote.
    """

    path: Path
    file: Path
    format: str
    scheme: str
    config: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> Quantization | None:
        """None where there is no config.json, or nothing says that it is quantized.

        Raise IncompatibleVariant for a method that quantkit does not read, CheckpointError where
        the settings make no sense.
        """
        file = path / "config.json"
        if not file.is_file():
            return None
        found = read_object(file).get("quantization_config")
        if found is None:
            file, found = _beside(path)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise CheckpointError(f"{file}: quantization_config is {found!r}, expected an object")
        method = found.get("quant_method")
        if method in _SOURCES:
            return None
        if not isinstance(method, str) or method not in _METHODS:
            raise IncompatibleVariant(
                f"{path}: quant_method is {method!r}; quantkit reads "
                f"{', '.join(map(repr, _METHODS))}, and safetensors that are not quantized"
            )
        format_ = _METHODS[method]
        if format_ == "auto-round":
            format_ = "awq" if "awq" in packing(found) else "gptq"
        return cls(path, file, format_, _scheme(found, file), found)

    @classmethod
    def opened(cls, path: Path) -> Quantization:
        """Raise CheckpointError where there is none."""
        found = cls.of(path)
        if found is None:
            raise CheckpointError(f"{path}: its config.json has no quantization_config")
        return found

    @property
    def is_beside(self) -> bool:
        """Whether config.json does not have it."""
        return self.file.name in _BESIDE

    def require(self, key: str, *values: Any) -> None:
        """Raise IncompatibleVariant where the key is there and has none of these values."""
        if self.config.get(key, values[0]) not in values:
            raise IncompatibleVariant(
                f"{self.path}: {key} is {self.config[key]!r}; quantkit unpacks "
                f"{', '.join(map(repr, values))}"
            )


def refuse_packed(spec: object, checkpoint: Checkpoint) -> None:
    """Raise ConversionError for a source whose weights are quantized, and not decoded."""
    if checkpoint.quantized:
        return
    if found := Quantization.of(checkpoint.path):
        raise ConversionError(
            f"{spec}: {checkpoint.id} is quantized already ({found.config['quant_method']}); "
            "convert the unquantized weights"
        )


def packing(config: Mapping[str, Any]) -> str:
    """How AutoRound says that it packed: ``auto_round:auto_gptq``; once as ``backend``."""
    return str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq")


def _beside(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The settings of packed weights whose config.json has none, under config.json's keys, and
    their file."""
    for name, method in _BESIDE.items():
        file = path / name
        # What lies beside plain weights is of no account.
        if file.is_file() and linears_of(tensors_in(path)):
            found = {_AUTOAWQ_KEYS.get(key, key): value for key, value in read_object(file).items()}
            return file, {"quant_method": method, **found}
    return path / "config.json", None


def _scheme(config: Mapping[str, Any], file: Path) -> str:
    """``w4g128``; of several groups of layers (compressed-tensors) the first one's."""
    groups = config.get("config_groups")
    if groups:
        group = next(iter(groups.values())) if isinstance(groups, dict) else None
        weights = group.get("weights") or {} if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise CheckpointError(f"{file}: config_groups is {groups!r}, expected groups of layers")
        config = weights
    bits, size = config.get("bits", config.get("num_bits")), config.get("group_size")
    for key, value in (("bits", bits), ("group_size", size)):
        if value is not None and type(value) is not int:
            raise CheckpointError(f"{file}: {key} is {value!r}, expected a whole number")
    return f"w{bits}g{-1 if size is None else size}"


def linears_of(tensors: Iterable[str]) -> list[str]:
    """Names of the quantized linears, without the ends of their tensors' names."""
    return [name.rpartition(".")[0] for name in tensors if name.endswith(_QUANTIZED)]


def tensor_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of the data of tensors."""
    return sum(info.bytes for info in tensors)


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
            except (RuntimeError, IndexError, ValueError, ZeroDivisionError) as error:
                shapes = ", ".join(
                    f"{p} {list(t.shape)}" for p, t in zip(parts, needed, strict=True)
                )
                raise CheckpointError(
                    f"{directory}: {stem}: its parts do not fit together ({shapes}): {error}"
                ) from error
        elif part not in (*parts, *optional):
            yield name, packed.read(name)


class Packed(Safetensors):
    """What the formats of packed integers have in common; each unpacks its own way."""

    name: str

    def detect(self, path: Path) -> Variant | None:
        """As ``Format.detect``: by the quantization_config."""
        refuse_adapter(path)
        found = Quantization.of(path)
        if found is None or found.format != self.name:
            return None
        return Variant(path.name, path, found.format, found.scheme, None)

    def inspect(self, model: Model) -> dict[str, Any]:
        """As ``Format.inspect``."""
        packed = opened(model)
        return {
            "architecture": packed.architecture,
            "context_length": packed.config.get("max_position_embeddings"),
            "tensors": len(packed.tensors),
            "quantized_linears": len(linears_of(packed.tensors)),
            "bytes": tensor_bytes(packed.tensors.values()),
            "quantization_config": Quantization.opened(model.path).config,
        }

    def bits_per_weight(self, variant: Variant, source: Checkpoint) -> tuple[float, float | None]:
        """As ``Format.bits_per_weight``."""
        return bits_of(opened(variant).tensors, source)
