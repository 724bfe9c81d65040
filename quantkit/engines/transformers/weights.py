"""A model built from its config.json, its weights read one at a time, unpacked where quantized."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import dtypes
from quantkit.checkpoint import Checkpoint
from quantkit.decoder import experts
from quantkit.decoder.stored_names import StoredNames
from quantkit.errors import CheckpointError, IncompatibleVariant, first_line, reading
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
    with reading(checkpoint.path / "config.json"), no_init_weights():
        try:
            model = AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=False,
                attn_implementation=attention(config),
                dtype=dtype,
            )
        except ValueError as error:  # an architecture that transformers does not have
            raise IncompatibleVariant(f"{source.path}: {first_line(error)}") from error
        experts.separate(model)
    model.tie_weights()
    stored = StoredNames.of(model, checkpoint.tensors)
    slots: dict[str, torch.Tensor] = {stored(n): slot for n, slot in model.state_dict().items()}
    # Old checkpoints store what follows from the config.
    follows = ["rotary_emb.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())]
    plain = [dtypes.torch_dtype(dtype) for dtype in dtypes.WEIGHTS]
    filled = set()
    for name, tensor in _weights(source):
        if name not in slots and any(re.search(pattern, name) for pattern in follows):
            continue
        slot = slots.get(name)
        if slot is None and name.endswith(".bias") and not tensor.any():
            continue  # some packages give every linear a bias, of zeros
        if slot is None or slot.shape != tensor.shape:
            wanted = "no such tensor" if slot is None else f"the shape {list(slot.shape)}"
            raise CheckpointError(
                f"{source.path}: {name} {list(tensor.shape)}: {type(model).__name__} of its "
                f"config.json has {wanted}"
            )
        if slot.is_floating_point() and tensor.dtype not in plain:
            raise CheckpointError(
                f"{source.path}: {name} is stored as {tensor.dtype}, and config.json does not say "
                "how it was quantized; get the checkpoint as it was before"
            )
        slot.copy_(tensor)
        filled.add(slot.data_ptr())
    # Tied weights share their memory: one of the names suffices.
    missing = [name for name, slot in slots.items() if slot.data_ptr() not in filled]
    if missing:
        raise CheckpointError(
            f"{source.path}: {len(missing)} tensors that config.json asks for are missing, "
            f"for example {missing[0]}"
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
