"""The scale of a linear's whole input, which NVFP4 has above those of groups: found on text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from quantkit.decoder.expert_names import expert_of, is_routed, mixture_of
from quantkit.errors import ConversionError
from quantkit.quantize.float_weights import global_scale
from quantkit.quantize.inputs import multiplied


def input_scales(
    block: nn.Module, inputs: Iterable[Sequence[str]], run: Callable[[], None], where: str
) -> dict[str, torch.Tensor]:
    """By linear, its ``input_global_scale``, (1,) float32: by the largest magnitude that it is
    given while ``run`` sends text through the block, as llm-compressor's ``static_minmax``.

    ``inputs``: linears of the block with one input together, which so get one scale: vLLM keeps
    only the largest of those that it runs as one. Experts of a mixture share theirs, as each would
    see only some of the tokens. Raise ConversionError where a linear sees none, or one that is not
    finite; ``where`` names the block.
    """
    sharing = {tuple(names): _shared_by(names[0]) for names in inputs}
    largest: dict[str, torch.Tensor] = {}

    def watching(key: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def watch(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            if given[0].numel():
                size = multiplied(given[0]).abs().amax().float()
                largest[key] = torch.maximum(size, largest.get(key, size))

        return watch

    hooks = [
        block.get_submodule(names[0]).register_forward_pre_hook(watching(key))
        for names, key in sharing.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, torch.Tensor] = {}
    for names, key in sharing.items():
        if key not in largest:
            raise ConversionError(f"{where}.{names[0]} sees no token of the calibration text")
        size = float(largest[key])
        if not math.isfinite(size):
            raise ConversionError(
                f"{where}.{names[0]}: its input on calibration text is not finite"
            )
        found |= dict.fromkeys(names, global_scale(size))
    return found


def _shared_by(linear: str) -> str:
    """What is the same for the linears of all experts that do the same."""
    if not is_routed(linear):
        return linear
    return mixture_of(linear) + linear.removeprefix(expert_of(linear))
