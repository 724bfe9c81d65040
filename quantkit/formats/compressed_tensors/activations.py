"""What the inputs of linears are rounded to as engines compute, and the same here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.errors import CheckpointError, IncompatibleVariant
from quantkit.formats.compressed_tensors.groups import check_targets, group_of
from quantkit.formats.compressed_tensors.presets import PRESETS, Rounding
from quantkit.formats.packed import Quantization
from quantkit.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

_INT8_MAX = 127
"""vLLM's kernels divide by it: the one integer more on the negative side is not used."""


@dataclass(frozen=True)
class QuantizedInputs:
    """``roundings``: of the input of each linear, by the name of its weight. ``global_scales``: by
    the same names, of those that have a stored scale of the whole input."""

    roundings: Mapping[str, Rounding]
    global_scales: Mapping[str, float]

    @classmethod
    def of(cls, quantization: Quantization, linears: Iterable[str]) -> QuantizedInputs | None:
        """Of ``linears``, all that are quantized; None where no inputs are rounded.

        Raise IncompatibleVariant where they are rounded as quantkit does not compute it,
        CheckpointError where a stored scale is missing.
        """
        groups = quantization.config["config_groups"]
        where = f"{quantization.file}: input_activations"
        roundings = {
            key: _checked(where, Rounding.of(group["input_activations"]))
            for key, group in groups.items()
            if group.get("input_activations")
        }
        if not roundings:
            return None
        for key, group in groups.items():
            check_targets(group.get("targets"), f"{quantization.file}: {key}")
        found = {
            f"{linear}.weight": roundings[key]
            for linear in linears
            if (key := group_of(groups, linear)) in roundings
        }
        stored = [name for name, rounding in found.items() if rounding.dynamic == "local"]
        return cls(found, _global_scales(quantization, stored) if stored else {})

    def rounded(self, weight: str, inputs: torch.Tensor) -> torch.Tensor:
        """``inputs`` (…, in) of the linear with this weight, as the kernel multiplies them."""
        return round_inputs(inputs, self.roundings[weight], self.global_scales.get(weight, 1.0))


def round_inputs(
    inputs: torch.Tensor, rounding: Rounding, global_scale: float = 1.0
) -> torch.Tensor:
    """The values nearest to ``inputs`` (…, in) that kernels compute with, in the same dtype.

    Scales are those of vLLM's kernels: of a token, or of a group of its channels, such that the
    largest magnitude becomes the largest that the type has; of MXFP4 powers of two, of NVFP4 E4M3
    after ``global_scale`` is multiplied in, which is divided out again.
    """
    import torch

    from quantkit.formats.floats import E2M1_MAX, E4M3_MAX, mx_exponents, round_e2m1, to_e4m3

    values = inputs.float()
    size = rounding.group_size or values.shape[-1]
    grouped = values.view(*values.shape[:-1], -1, size)
    largest = grouped.abs().amax(-1, keepdim=True)
    if rounding.strategy == "tensor_group":
        scale = to_e4m3(largest / E2M1_MAX * global_scale).float()
        # What is too small for a scale of its own becomes 0, whatever it is divided by.
        scale = torch.where(scale == 0, 1.0, scale) / global_scale
        found = round_e2m1(grouped / scale) * scale
    elif rounding.num_bits == 4:
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
    known = known and rounding.dynamic is True
    known |= rounding == PRESETS["NVFP4"].activations
    if not rounding.symmetric or not known:
        raise IncompatibleVariant(
            f"{where}: quantkit computes dynamic, symmetric INT8 and FP8 of tokens or groups, "
            f"MXFP4 and NVFP4, not these: {rounding.num_bits} bits, {rounding.type}, "
            f"{rounding.strategy}, dynamic {rounding.dynamic}"
        )
    return rounding


def _global_scales(quantization: Quantization, weights: Iterable[str]) -> dict[str, float]:
    stored = Checkpoint.open(quantization.path)
    found = {}
    for weight in weights:
        name = f"{weight.removesuffix('.weight')}.input_global_scale"
        if name not in stored.tensors or stored.tensors[name].numel != 1:
            raise CheckpointError(
                f"{quantization.path}: {name} is not there, as one number; its inputs are rounded "
                "by it: the checkpoint is not complete, get it again"
            )
        found[weight] = float(stored.read(name))
    return found
