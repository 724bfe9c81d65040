"""The schemes of compressed-tensors, under the names that the library gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from quantkit.errors import RecipeError, did_you_mean
from quantkit.models.spec import Spec

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"

Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group"]


@dataclass(frozen=True)
class Rounding:
    """How weights, or the inputs of a linear, are rounded.

    ``strategy``: what shares a scale: an output channel, a group of ``group_size`` inputs, a
    ``block`` of rows and columns, a token, or a group below a scale of the whole tensor.
    ``dynamic``: whether scales are found as the engine runs; ``local``: those of groups alone.
    """

    type: Literal["int", "float"]
    num_bits: int
    strategy: Strategy
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    dynamic: bool | Literal["local"] = False

    def described(self) -> dict[str, Any]:
        """As config.json has it."""
        return {
            "num_bits": self.num_bits,
            "type": self.type,
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group_size,
            "block_structure": list(self.block) if self.block else None,
            "dynamic": self.dynamic,
            "actorder": None,
            **self._dtype_of_scales,
        }

    @property
    def _dtype_of_scales(self) -> dict[str, str]:
        """Of 4-bit floats, whose scales are rounded themselves."""
        if (self.type, self.num_bits) != ("float", 4):
            return {}
        eight_bits = self.strategy == "tensor_group"
        return {"scale_dtype": "torch.float8_e4m3fn" if eight_bits else "torch.uint8"}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Rounding:
        """From config.json."""
        block = config.get("block_structure")
        block = tuple(block) if isinstance(block, list) else None
        return cls(
            type=config.get("type", "int"),
            num_bits=config.get("num_bits", 8),
            strategy=config.get("strategy", "tensor"),
            group_size=config.get("group_size"),
            block=block,
            symmetric=config.get("symmetric", True),
            dynamic=config.get("dynamic", False),
        )


@dataclass(frozen=True)
class Preset:
    """A scheme: ``layout`` is the library's name for how its tensors lie in the file."""

    name: str
    layout: str
    weights: Rounding
    activations: Rounding | None = None

    @property
    def is_integer(self) -> bool:
        """Whether the weights are integers."""
        return self.weights.type == "int"

    @property
    def scales_whole_inputs(self) -> bool:
        """Whether the file has a scale of each linear's whole input, which text decides on."""
        return self.activations is not None and self.activations.dynamic == "local"

    def described(
        self, ignored: Sequence[str], others: Mapping[Preset, Sequence[str]] | None = None
    ) -> dict[str, Any]:
        """The ``quantization_config`` of a checkpoint whose linears have this scheme, but for
        ``ignored``, and ``others`` with the names of those that have another."""
        targets = {self: ["Linear"], **(others or {})}
        groups = {
            f"group_{number}": {
                "targets": list(names),
                "weights": one.weights.described(),
                "input_activations": one.activations and one.activations.described(),
                "output_activations": None,
                "format": one.layout,
            }
            for number, (one, names) in enumerate(targets.items())
        }
        layouts = {one.layout for one in targets}
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "config_groups": groups,
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }


def _integers(bits: int, *, symmetric: bool = True) -> Rounding:
    return Rounding("int", bits, "group", 128, symmetric=symmetric)


_OF_TOKENS = Rounding("int", 8, "token", dynamic=True)
_FP8_OF_TOKENS = Rounding("float", 8, "token", dynamic=True)
_FP4 = Rounding("float", 4, "tensor_group", 16)
_MX = Rounding("float", 4, "group", 32)

_ALL = (
    Preset("W4A16", PACKED, _integers(4)),
    Preset("W4A16_ASYM", PACKED, _integers(4, symmetric=False)),
    Preset("W8A16", PACKED, _integers(8)),
    Preset("W8A8", INT, Rounding("int", 8, "channel"), _OF_TOKENS),
    Preset("FP8_DYNAMIC", FLOAT, Rounding("float", 8, "channel"), _FP8_OF_TOKENS),
    Preset(
        "FP8_BLOCK",
        FLOAT,
        Rounding("float", 8, "block", block=(128, 128)),
        Rounding("float", 8, "group", 128, dynamic=True),
    ),
    Preset("NVFP4A16", NVFP4, _FP4),
    Preset("NVFP4", NVFP4, _FP4, replace(_FP4, dynamic="local")),
    Preset("MXFP4A16", MXFP4, _MX),
    Preset("MXFP4", MXFP4, _MX, replace(_MX, dynamic=True)),
)
PRESETS = {preset.name: preset for preset in _ALL}


def preset(spec: Spec, group_size: int | None) -> Preset:
    """That of a spec, its integers in groups of ``group_size``, -1 for a whole channel, where the
    scheme leaves that open. Raise RecipeError for an unknown name."""
    if spec.scheme not in PRESETS:
        raise RecipeError(
            f"spec {spec}: unknown scheme {spec.scheme!r}; {spec.format} takes "
            f"{', '.join(PRESETS)}" + did_you_mean(spec.scheme, PRESETS)
        )
    found = PRESETS[spec.scheme]
    if group_size is None or found.layout != PACKED:
        return found
    if group_size == -1:
        return replace(found, weights=replace(found.weights, strategy="channel", group_size=None))
    return replace(found, weights=replace(found.weights, group_size=group_size))


def named(group: Mapping[str, Any]) -> str | None:
    """The name of the scheme that a group of config.json describes; None for one without a name
    here, such as with other groups."""
    weights, inputs = (
        Rounding.of(found) if isinstance(found := group.get(key), Mapping) else None
        for key in ("weights", "input_activations")
    )
    return next(
        (one.name for one in _ALL if (one.weights, one.activations) == (weights, inputs)), None
    )
