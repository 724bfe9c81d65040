"""A checkpoint whose weights are stored as several tensors each: decoded one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import CheckpointError
from quantkit.formats import decoding
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

Shape = tuple[int, ...]

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_OF_ACTIVATIONS = (
    *("input_scale", "input_scale_ub", "activation_scale", "output_scale"),
    "input_global_scale",
)
"""Beside a linear's weight: what kernels need for activations, and weights do not."""
SHAPE = ".weight_shape"
"""The part that says what shape a weight has, where words may end in a gap."""
_OF_CACHE = ("k_scale", "v_scale", "q_scale")


@dataclass(frozen=True)
class Encoding:
    """How one tensor is stored as several: ``NAME + part`` for each of ``parts``.

    The first of ``parts`` tells that it is stored so. ``plain``: the end of its name when decoded.
    ``shape``: its shape, from those of the parts that there are. ``decode``: its values, float32.
    ``is_for``: whether it is that of a linear, by its name.
    """

    parts: tuple[str, ...]
    optional: tuple[str, ...]
    plain: str
    shape: Callable[[Mapping[str, Shape]], Shape]
    decode: Callable[..., torch.Tensor]
    is_for: Callable[[str], bool] = lambda _: True


@dataclass(frozen=True)
class _Place:
    """The encoding of a tensor, and the start of the names of its parts."""

    encoding: Encoding
    stem: str


@dataclass(frozen=True, eq=False)
class Decoded(Checkpoint):
    """A quantized checkpoint under the names and in the shapes of plain weights.

    ``read`` decodes into the dtype that config.json names. ``config`` and ``hf_config`` are those
    of a model that is not quantized.
    """

    stored: Checkpoint = field(kw_only=True, repr=False)
    places: dict[str, _Place] = field(kw_only=True, repr=False)

    @classmethod
    def of(cls, stored: Checkpoint, method: str, encodings: list[Encoding]) -> Decoded:
        """Raise CheckpointError where a part is missing or the parts do not fit together."""
        dtype = _dtype(stored)
        places: dict[str, _Place] = {}
        tensors: dict[str, TensorInfo] = {}
        used: set[str] = set()
        for name, info in stored.tensors.items():
            found = _encoding(info, encodings, stored.tensors)
            if found is None:
                continue
            stem = name.removesuffix(found.parts[0])
            missing = [part for part in found.parts if stem + part not in stored.tensors]
            if missing:
                raise CheckpointError(
                    f"{info.shard}: {name} has no {', '.join(stem + part for part in missing)} "
                    "beside it; the checkpoint is not complete, get it again"
                )
            names = {part: stem + part for part in (*found.parts, *found.optional)}
            there = {part: name for part, name in names.items() if name in stored.tensors}
            shapes = {part: stored.tensors[name].shape for part, name in there.items()}
            try:
                shape = found.shape(shapes)
                if SHAPE in there:  # rows of words may end in a gap
                    shape = tuple(stored.read(there[SHAPE]).tolist())
            except (ValueError, IndexError, ZeroDivisionError) as error:
                raise _misfit(info, stem, shapes) from error
            plain = stem + found.plain
            places[plain] = _Place(found, stem)
            tensors[plain] = TensorInfo(plain, dtype, shape, info.shard)
            used |= set(there.values())
        for name, info in stored.tensors.items():
            beside = name.rpartition(".")
            of_linear = beside[2] in _OF_ACTIVATIONS and f"{beside[0]}.weight" in places
            if name not in used and not of_linear and beside[2] not in _OF_CACHE:
                tensors[name] = info
        without = {k: v for k, v in stored.config.items() if k != "quantization_config"}
        known = {f.name: getattr(stored, f.name) for f in fields(Checkpoint)}
        note = (
            f"the source is quantized already ({method}): its {len(places)} quantized tensors are "
            f"decoded to {dtype}, and drift is measured against the source as it is stored"
        )
        known |= {
            "config": without,
            "tensors": tensors,
            "notes": (*stored.notes, note),
            "quantized": method,
        }
        return cls(**known, stored=stored, places=places)

    def read(self, name: str) -> torch.Tensor:
        """One tensor: decoded, or as it is stored where it is not quantized."""
        return self.exact(name).to(self.tensors[name].torch_dtype)

    def exact(self, name: str) -> torch.Tensor:
        """As ``read``, but what is decoded in float32, not rounded to the dtype."""
        place = self.places.get(name)
        if place is None:
            return self.stored.read(name)
        encoding, stem = place.encoding, place.stem
        parts = {
            part: self.stored.read(stem + part)
            for part in (*encoding.parts, *encoding.optional)
            if stem + part in self.stored.tensors
        }
        info = self.tensors[name]
        arguments = [parts.get(part) for part in (*encoding.parts, *encoding.optional)]
        try:
            weight = encoding.decode(*arguments)
        except (RuntimeError, IndexError, ValueError, ZeroDivisionError) as error:
            shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
            raise _misfit(info, stem, shapes) from error
        if weight.shape != info.shape:
            raise _misfit(info, stem, {part: tuple(t.shape) for part, t in parts.items()})
        return weight

    @property
    def weights(self) -> Path:
        """What is stored."""
        return self.stored.weights

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Of the files as they are stored."""
        return self.stored.sha256

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """The stored one's, without its quantization."""
        config = self.stored.hf_config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return config


def _encoding(
    info: TensorInfo, encodings: Sequence[Encoding], tensors: Collection[str]
) -> Encoding | None:
    """That of which a tensor is the first part; where several begin alike, one that is whole."""
    begun = [
        encoding
        for encoding in encodings
        # A plain `.weight` is one that nothing was done to.
        if info.name.endswith(encoding.parts[0])
        and encoding.is_for(info.name.removesuffix(encoding.parts[0]))
        and (encoding.parts[0] != ".weight" or info.dtype in ("F8_E4M3", "F8_E5M2", "I8"))
    ]

    def whole(encoding: Encoding) -> bool:
        stem = info.name.removesuffix(encoding.parts[0])
        return all(stem + part in tensors for part in encoding.parts)

    return next(filter(whole, begun), begun[0] if begun else None)


def _dtype(checkpoint: Checkpoint) -> str:
    """What config.json says that weights are; bfloat16 where it does not."""
    config = checkpoint.config
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    named = next(
        (c[key] for c in (config, inner) for key in ("dtype", "torch_dtype") if c.get(key)),
        "bfloat16",
    )
    if named not in _DTYPES:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: dtype is {named!r}, expected one of "
            f"{', '.join(_DTYPES)}"
        )
    return _DTYPES[named]


def _misfit(info: TensorInfo, stem: str, shapes: Mapping[str, Shape]) -> CheckpointError:
    listed = ", ".join(f"{part.lstrip('._')} {list(shape)}" for part, shape in shapes.items())
    return CheckpointError(f"{info.shard}: {stem}: its parts do not fit together ({listed})")


def scaled(scale: str, block: tuple[int, int] | None, zeros: tuple[str, ...] = ()) -> Encoding:
    """A weight of 8 bits an element, and its scales."""

    def shape(shapes: Mapping[str, Shape]) -> Shape:
        decoding.check_scales(shapes[".weight"], shapes[scale], block)
        return shapes[".weight"]

    return Encoding(
        (".weight", scale), zeros, ".weight", shape, partial(decoding.scaled, block=block)
    )


def block_size(size: object, where: object) -> tuple[int, int] | None:
    """Rows and columns of a block, from JSON; raise CheckpointError for what is none."""
    if size is None:
        return None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    raise CheckpointError(f"{where}: a block of weights is {size!r}, expected two whole numbers")
