"""A model built from its config.json, its weights read one at a time, unpacked where quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from quantkit.decoder import experts
from quantkit.decoder.turned import turn
from quantkit.errors import (
    CheckpointError,
    IncompatibleVariant,
    QuantkitError,
    first_line,
    reading,
)
from quantkit.formats import load_format
from quantkit.formats.base import Dequantizes, QuantizedInputs, QuantizesInputs
from quantkit.models import dtypes
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.hf_config import attention
from quantkit.models.stored_names import Part, StoredNames, is_ignored
from quantkit.models.text_part import is_part, text_config
from quantkit.models.unstacked import unstacked
from quantkit.models.variant import Model
from quantkit.system.progress import say

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


def load(source: Model, dtype: torch.dtype, *, exact_inputs: bool = False) -> Any:
    """Build the model that config.json describes and fill in its weights, one at a time.

    Where engines round the inputs of linears, too, so does this model, but for ``exact_inputs``.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source.path)
    for note in checkpoint.notes:
        say(f"{checkpoint.id}: {note}")
    model = _built(checkpoint, dtype)
    stored = StoredNames.of(model, checkpoint.tensors)
    slots: dict[str, torch.Tensor] = model.state_dict()
    missing = set(slots)
    plain = [dtypes.torch_dtype(dtype) for dtype in dtypes.WEIGHTS]
    beside = set(stored.beside(checkpoint.tensors))
    inputs = None if exact_inputs else _quantized_inputs(source)
    for name, whole in _weights(source):
        if name in beside:
            continue
        for part in stored.parts_of(name) or [Part(name)]:
            # What was packed is (out, in) of one expert already.
            packed = name not in checkpoint.tensors
            tensor = whole if part.cut is None or packed else part.cut(whole)
            slot = slots.get(part.name)
            if slot is None and is_ignored(model, name):
                continue
            if slot is None and name.endswith(".bias") and not tensor.any():
                continue  # some packages give every linear a bias, of zeros
            if slot is None or slot.shape != tensor.shape:
                raise _misfit(checkpoint, model, name, tensor.shape, slot)
            if slot.is_floating_point() and tensor.dtype not in plain:
                raise _not_plain(checkpoint, name, str(tensor.dtype))
            slot.copy_(tensor)
            missing.discard(part.name)
            if inputs and name in inputs.roundings:
                linear = model.get_submodule(part.name.removesuffix(".weight"))
                linear.register_forward_pre_hook(_rounding(inputs, name))
    # As in from_pretrained: not where both are there and differ, and from whichever is there.
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise _lacking(checkpoint, set(map(stored, missing)))
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def check(checkpoint: Checkpoint) -> None:
    """Raise what ``load`` would for names and shapes, before any long work; reads no tensor."""
    import torch

    with torch.device("meta"):
        model = _built(checkpoint, torch.float32)
    checkpoint = unstacked(checkpoint, model)
    stored = StoredNames.of(model, checkpoint.tensors)
    slots = {stored(name): slot for name, slot in model.state_dict().items()}
    beside = set(stored.beside(checkpoint.tensors))
    for name, info in checkpoint.tensors.items():
        if name in beside:
            continue
        slot = slots.get(name)
        if slot is None and (is_ignored(model, name) or name.endswith(".bias")):
            continue
        if slot is None or slot.shape != info.shape:
            raise _misfit(checkpoint, model, name, info.shape, slot)
        if slot.is_floating_point() and info.dtype not in dtypes.WEIGHTS:
            raise _not_plain(checkpoint, name, info.dtype)
    missing = slots.keys() - checkpoint.tensors - set(map(stored, model.all_tied_weights_keys))
    if missing:
        raise _lacking(checkpoint, missing)


def _built(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model without its weights, its experts apart, nothing tied."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = _unquantized(text_config(checkpoint))
    with reading(checkpoint.path / "config.json"), no_init_weights():
        try:
            model = AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=False,
                attn_implementation=attention(config),
                dtype=dtype,
            )
        except ValueError as error:  # an architecture that transformers does not have
            raise _with_more_than_text(checkpoint) or IncompatibleVariant(
                f"{checkpoint.path}: {first_line(error)}"
            ) from error
        experts.separate(model)
        turn(model)
    return model


def _misfit(
    checkpoint: Checkpoint, model: Any, name: str, shape: Sequence[int], slot: torch.Tensor | None
) -> QuantkitError:
    wanted = "no such tensor" if slot is None else f"the shape {list(slot.shape)}"
    return CheckpointError(
        f"{checkpoint.path}: {name} {list(shape)}: {type(model).__name__} of its config.json has "
        f"{wanted}"
    )


def _not_plain(checkpoint: Checkpoint, name: str, dtype: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: {name} is stored as {dtype}, and config.json does not say how it was "
        "quantized; get the checkpoint as it was before"
    )


def _lacking(checkpoint: Checkpoint, missing: Collection[str]) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path}: {len(missing)} tensors that config.json asks for are missing, "
        f"for example {min(missing)}"
    )


def _with_more_than_text(checkpoint: Checkpoint) -> IncompatibleVariant | None:
    """The error for a model that sees or hears; None for others."""
    if not is_part(checkpoint):
        return None
    return IncompatibleVariant(
        f"{checkpoint.path}: {checkpoint.architecture} has a language model in text_config that "
        "transformers cannot build by itself, so quantkit does not measure it; `quantkit convert` "
        "makes a GGUF of the text part, which `quantkit evaluate`, without a reference, and "
        "`quantkit serve` take"
    )


def _unquantized(config: PretrainedConfig) -> PretrainedConfig:
    """The config as of a model that is not quantized."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _quantized_inputs(source: Model) -> QuantizedInputs | None:
    """None where only weights are quantized, or nothing."""
    if isinstance(source, Checkpoint):
        return None
    format_ = load_format(source.format)
    return format_.quantized_inputs(source) if isinstance(format_, QuantizesInputs) else None


def _rounding(inputs: QuantizedInputs, weight: str) -> Callable[..., tuple[Any, ...]]:
    """A hook for the linear with this weight."""

    def hook(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs.rounded(weight, given[0]), *given[1:]

    return hook


def _weights(source: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its plain name, dequantized where it is not plain."""
    if isinstance(source, Checkpoint):
        return ((name, source.read(name)) for name in source.tensors)
    format_ = load_format(source.format)
    if not isinstance(format_, Dequantizes):
        raise IncompatibleVariant(f"{source.path}: transformers does not unpack {source.format}")
    return format_.dequantize(source)
