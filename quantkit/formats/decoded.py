"""A checkpoint whose weights are stored quantized, as a source: decoded one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, IncompatibleVariant
from quantkit.formats import awq, compressed_tensors, decoding, gptq
from quantkit.formats.packed import Quantization
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.tensors import TensorInfo
from quantkit.system.json_file import read_object

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

Shape = tuple[int, ...]

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_OF_ACTIVATIONS = ("input_scale", "input_scale_ub", "activation_scale", "output_scale")
"""Beside a linear's weight: what kernels need for activations, and weights do not."""
_SHAPE = ".weight_shape"
_OF_CACHE = ("k_scale", "v_scale", "q_scale")


@dataclass(frozen=True)
class Encoding:
    """How one tensor is stored as several: ``NAME + part`` for each of ``parts``.

    The first of ``parts`` tells that it is stored so. ``plain``: the end of its name when decoded.
    ``shape``: its shape, from those of the parts that there are. ``decode``: its values, float32.
    """

    parts: tuple[str, ...]
    optional: tuple[str, ...]
    plain: str
    shape: Callable[[Mapping[str, Shape]], Shape]
    decode: Callable[..., torch.Tensor]


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
            found = _encoding(name, info, encodings)
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
                if _SHAPE in there:  # rows of words may end in a gap
                    shape = tuple(stored.read(there[_SHAPE]).tolist())
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
            weight = encoding.decode(*arguments).to(info.torch_dtype)
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


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` itself where it is plain, else as a source whose weights are decoded.

    Raise IncompatibleVariant for a quantization that cannot be decoded, CheckpointError where its
    tensors do not fit.
    """
    file = checkpoint.path / "config.json"
    config = read_object(file).get("quantization_config")
    if config is None and (beside := Quantization.of(checkpoint.path)):
        config = beside.config
    if config is None:
        return checkpoint
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: quantization_config is {config!r}, expected an object")
    method = config.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return Decoded.of(checkpoint, str(method), _fp8(config, file))
    if method == "mxfp4":
        return Decoded.of(checkpoint, "mxfp4", [_MXFP4])
    if method == "compressed-tensors":
        name = f"compressed-tensors, {config.get('format')}"
        return Decoded.of(checkpoint, name, _compressed(config, file))
    if method in ("gptq", "awq", "auto-round", "intel/auto-round"):
        quantization = Quantization.opened(checkpoint.path)
        return Decoded.of(checkpoint, str(method), [_integers(quantization)])
    raise IncompatibleVariant(
        f"{file}: quant_method is {method!r}, which quantkit does not decode; it decodes fp8, "
        "fbgemm_fp8, mxfp4, compressed-tensors, gptq, awq and auto-round"
    )


def open_decoded(source: str | Path) -> Checkpoint:
    """As ``Checkpoint.open``, and decoded where it is quantized."""
    return decoded(Checkpoint.open(source))


def _encoding(name: str, info: TensorInfo, encodings: list[Encoding]) -> Encoding | None:
    for encoding in encodings:
        if not name.endswith(encoding.parts[0]):
            continue
        # A plain `.weight` is one that nothing was done to.
        if encoding.parts[0] != ".weight" or info.dtype in ("F8_E4M3", "F8_E5M2", "I8"):
            return encoding
    return None


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


def _scaled(scale: str, block: tuple[int, int] | None, zeros: tuple[str, ...] = ()) -> Encoding:
    """A weight of 8 bits an element, and its scales."""

    def shape(shapes: Mapping[str, Shape]) -> Shape:
        decoding.check_scales(shapes[".weight"], shapes[scale], block)
        return shapes[".weight"]

    return Encoding(
        (".weight", scale), zeros, ".weight", shape, partial(decoding.scaled, block=block)
    )


def _fp8(config: Mapping[str, Any], file: Path) -> list[Encoding]:
    block = _block(config.get("weight_block_size"), file)
    if config["quant_method"] == "fbgemm_fp8":
        return [_scaled(".weight_scale", None)]
    # Of scales of a whole tensor or of rows too, where there is no block size.
    return [_scaled(".weight_scale_inv", block)]


def _block(size: object, file: Path) -> tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    raise CheckpointError(f"{file}: a block of weights is {size!r}, expected two whole numbers")


def _mxfp4_shape(shapes: Mapping[str, Shape]) -> Shape:
    experts, rows, groups, half = shapes["_blocks"]
    if shapes["_scales"] != (experts, rows, groups):
        raise ValueError("scales")
    return experts, groups * half * 2, rows


_MXFP4 = Encoding(("_blocks", "_scales"), (), "", _mxfp4_shape, decoding.mxfp4)
"""gpt-oss: stacks of experts, (experts, out, in) as stored and (experts, in, out) as computed."""


def _nvfp4_shape(shapes: Mapping[str, Shape]) -> Shape:
    rows, half = shapes[".weight_packed"]
    scale_rows, groups = shapes[".weight_scale"]
    if scale_rows != rows or half * 2 % groups:
        raise ValueError("scales")
    return rows, half * 2


_NVFP4 = Encoding(
    (".weight_packed", ".weight_scale", ".weight_global_scale"),
    (),
    ".weight",
    _nvfp4_shape,
    decoding.nvfp4,
)


def _compressed(config: Mapping[str, Any], file: Path) -> list[Encoding]:
    """One format for all groups; raise IncompatibleVariant for what is not decoded."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise IncompatibleVariant(f"{file}: its quantization_config has no groups")
    if config.get("transform_config"):
        raise IncompatibleVariant(f"{file}: has a transform_config, which quantkit does not decode")
    formats = {group.get("format") or config.get("format") for group in groups.values()}
    if len(formats) > 1:
        raise IncompatibleVariant(
            f"{file}: has several formats, and quantkit decodes only one: "
            f"{', '.join(sorted(map(str, formats)))}"
        )
    (format_,) = formats
    weights = next(iter(groups.values())).get("weights") or {}
    if format_ in ("float-quantized", "naive-quantized", "int-quantized"):
        block = _block(weights.get("block_structure"), file)
        return [_scaled(".weight_scale", block, (".weight_zero_point",))]
    if format_ == "nvfp4-pack-quantized":
        return [_NVFP4]
    if format_ == compressed_tensors.LAYOUT:
        return [_packed_integers(weights, file)]
    raise IncompatibleVariant(
        f"{file}: format is {format_!r}, which quantkit does not decode; it decodes "
        f"float-quantized, int-quantized, naive-quantized, nvfp4-pack-quantized and "
        f"{compressed_tensors.LAYOUT}"
    )


def _packed_integers(weights: Mapping[str, Any], file: Path) -> Encoding:
    bits = weights.get("num_bits")
    if bits not in (2, 4, 8):
        raise IncompatibleVariant(f"{file}: has {bits!r} bits; quantkit decodes 2, 4 and 8")
    per_word = 32 // bits

    def shape(shapes: Mapping[str, Shape]) -> Shape:
        rows, words = shapes[".weight_packed"]
        return rows, words * per_word

    def decode(
        packed: torch.Tensor,
        scale: torch.Tensor,
        shape: torch.Tensor,
        zeros: torch.Tensor | None,
        order: torch.Tensor | None,
    ) -> torch.Tensor:
        return compressed_tensors.unpack(
            packed, scale, shape, weight_zero_point=zeros, weight_g_idx=order
        )

    parts = (".weight_packed", ".weight_scale", _SHAPE)
    return Encoding(parts, (".weight_zero_point", ".weight_g_idx"), ".weight", shape, decode)


def _integers(quantization: Quantization) -> Encoding:
    """GPTQ's and AWQ's, or AutoRound's in one of the two."""
    parts = (".qweight", ".qzeros", ".scales")
    if quantization.format == "awq":
        awq.check(quantization)

        def of_awq(shapes: Mapping[str, Shape]) -> Shape:
            return shapes[".scales"][1], shapes[".qweight"][0]

        return Encoding(parts, (), ".weight", of_awq, awq.unpack)

    def of_gptq(shapes: Mapping[str, Shape]) -> Shape:
        outputs = shapes[".scales"][1]
        bits = shapes[".qzeros"][1] * 32 // outputs
        return outputs, shapes[".qweight"][0] * 32 // bits

    unpack = partial(gptq.unpack, zero_offset=gptq.zero_offset(quantization))
    return Encoding(parts, (".g_idx",), ".weight", of_gptq, unpack)
