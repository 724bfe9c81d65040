"""What the inputs of linears are rounded to as engines compute, and the same here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.errors import IncompatibleVariant
from quantkit.formats.compressed_tensors.presets import Rounding
from quantkit.formats.packed import Quantization

if TYPE_CHECKING:
    import torch

_INT8_MAX = 127
"""vLLM's kernels divide by it: the one integer more on the negative side is not used."""


@dataclass(frozen=True)
class QuantizedInputs:
    """``roundings``: of the input of each linear, by the name of its weight."""

    roundings: Mapping[str, Rounding]

    @classmethod
    def of(cls, quantization: Quantization, linears: Iterable[str]) -> QuantizedInputs | None:
        """Of ``linears``, all that are quantized; None where no inputs are rounded.

        Raise IncompatibleVariant where they are rounded as quantkit does not compute it.
        """
        groups = quantization.config["config_groups"].values()
        groups = [group for group in groups if group.get("input_activations")]
        if not groups:
            return None
        where = f"{quantization.file}: input_activations"
        roundings = [_checked(where, Rounding.of(g["input_activations"])) for g in groups]
        found = {}
        for linear in linears:
            for group, rounding in zip(groups, roundings, strict=True):
                if _targets(group, linear):
                    found[f"{linear}.weight"] = rounding
        return cls(found)

    def rounded(self, weight: str, inputs: torch.Tensor) -> torch.Tensor:
        """``inputs`` (…, in) of the linear with this weight, as the kernel multiplies them."""
        return round_inputs(inputs, self.roundings[weight])


def round_inputs(inputs: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """The values nearest to ``inputs`` (…, in) that kernels compute with, in the same dtype.

    Scales are those of vLLM's kernels: of a token, or of a group of its channels, such that the
    largest magnitude becomes the largest that the type has; of MXFP4 powers of two.
    """
    import torch

    from quantkit.formats.floats import E4M3_MAX, mx_exponents, round_e2m1, to_e4m3

    values = inputs.float()
    size = rounding.group_size or values.shape[-1]
    grouped = values.view(*values.shape[:-1], -1, size)
    largest = grouped.abs().amax(-1, keepdim=True)
    if rounding.num_bits == 4:
        scale = torch.exp2(mx_exponents(largest).float())
        found = round_e2m1(grouped / scale) * scale
    else:
        top = _INT8_MAX if rounding.type == "int" else E4M3_MAX
        scale = (largest / top).clamp(min=1e-12)
        scaled = grouped / scale
        near = scaled.round() if rounding.type == "int" else to_e4m3(scaled).float()
        found = near * scale
    return found.view_as(values).to(inputs.dtype)


def _checked(where: str, rounding: Rounding) -> Rounding:
    known = (rounding.num_bits == 8 and rounding.strategy in ("token", "group")) or (
        rounding.type == "float" and rounding.num_bits == 4 and rounding.group_size == 32
    )
    if rounding.dynamic is not True or not rounding.symmetric or not known:
        raise IncompatibleVariant(
            f"{where}: quantkit computes dynamic, symmetric INT8 and FP8 of tokens or groups, and "
            f"MXFP4, not these: {rounding.num_bits} bits, {rounding.type}, {rounding.strategy}, "
            f"dynamic {rounding.dynamic}"
        )
    return rounding


def _targets(group: Mapping[str, Any], linear: str) -> bool:
    """Whether the group is for a linear that is quantized, by its name in the file."""

    def is_for(target: str) -> bool:
        if target.startswith("re:"):
            return re.match(target.removeprefix("re:"), linear) is not None
        return target in ("Linear", linear) or linear.endswith(f".{target}")

    return any(is_for(str(target)) for target in group.get("targets") or ["Linear"])
