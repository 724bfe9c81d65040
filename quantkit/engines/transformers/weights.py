"""A model built from its config.json, its weights read one at a time, unpacked where quantized."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.decoder import experts
from quantkit.decoder.stored_names import StoredNames, is_ignored
from quantkit.errors import CheckpointError, IncompatibleVariant, first_line
from quantkit.hf_config import attention
from quantkit.variant import Model

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


def load(source: Model, dtype: torch.dtype) -> Any:
    """Build the model that config.json describes and fill in its weights, one at a time."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source.path)
    config = _unquantized(checkpoint.hf_config)
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=False,
                attn_implementation=attention(config),
                dtype=dtype,
            )
            experts.separate(model)
    except ValueError as error:  # an architecture that transformers does not have
        raise IncompatibleVariant(f"{source.path}: {first_line(error)}") from error
    stored = StoredNames.of(model, checkpoint.tensors)
    names = {stored(name): name for name in model.state_dict()}
    slots: dict[str, torch.Tensor] = model.state_dict()
    missing = set(slots)
    for name, tensor in _weights(source):
        if name not in names and is_ignored(model, name):
            continue
        slot = slots.get(names.get(name, ""))
        if slot is None and name.endswith(".bias") and not tensor.any():
            continue  # some packages give every linear a bias, of zeros
        if slot is None or slot.shape != tensor.shape:
            wanted = "no such tensor" if slot is None else f"the shape {list(slot.shape)}"
            raise CheckpointError(
                f"{source.path}: {name} {list(tensor.shape)}: {type(model).__name__} of its "
                f"config.json has {wanted}"
            )
        slot.copy_(tensor)
        missing.discard(names[name])
    # As in from_pretrained: not where both are there and differ, and from whichever is there.
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise CheckpointError(
            f"{source.path}: {len(missing)} tensors that config.json asks for are missing, "
            f"for example {min(map(stored, missing))}"
        )
    return model.eval().requires_grad_(False)


def _unquantized(config: PretrainedConfig) -> PretrainedConfig:
    """The config as of a model that is not quantized."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _weights(source: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its plain name, dequantized where it is not plain."""
    if isinstance(source, Checkpoint):
        return ((name, source.read(name)) for name in source.tensors)
    return _dequantized(source.format, source.path)


def _dequantized(format_: str, directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    module = importlib.import_module(f"quantkit.formats.{format_.replace('-', '_')}")
    tensors: Iterator[tuple[str, torch.Tensor]] = module.dequantize(directory)
    return tensors
