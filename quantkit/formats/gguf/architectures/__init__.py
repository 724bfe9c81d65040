"""How a transformers checkpoint becomes the tensors and hyperparameters that llama.cpp expects.

``families`` declares the architectures. Their names and keys follow llama.cpp's
``convert_hf_to_gguf.py``, whose files ours equal (tests/integration/test_gguf_architectures.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.errors import ConversionError
from quantkit.formats.gguf.architectures import config as configs
from quantkit.formats.gguf.architectures import limits, metadata, tensors
from quantkit.formats.gguf.architectures.architecture import Architecture
from quantkit.formats.gguf.architectures.families import SUPPORTED
from quantkit.formats.gguf.architectures.tensors import Tensor
from quantkit.formats.packed import refuse_packed
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.text_part import text_config

if TYPE_CHECKING:
    import gguf
    import torch

__all__ = [
    "SUPPORTED",
    "Architecture",
    "Tensor",
    "add_hyperparameters",
    "architecture_of",
    "check_config",
    "config_of",
    "layout",
    "read_tensor",
]


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Raise ConversionError, with what to do, for a class of model that quantkit cannot convert."""
    refuse_packed("gguf", checkpoint)
    name = checkpoint.architecture
    if name not in SUPPORTED:
        raise ConversionError(
            f"gguf: {checkpoint.id} is a {name}, which llama.cpp's own converter has to convert; "
            "get it: quantkit engines install llamacpp-converter"
        )
    return SUPPORTED[name]


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration of the language model, with the class of the whole: ``config`` below."""
    config: dict[str, Any] = text_config(checkpoint).to_dict()
    return config | {"architectures": [checkpoint.architecture]}


def check_config(config: dict[str, Any]) -> None:
    """Raise ConversionError for a model that llama.cpp would compute differently."""
    limits.check(SUPPORTED[config["architectures"][0]], configs.resolve(config))


def layout(checkpoint: Checkpoint, config: dict[str, Any]) -> list[Tensor]:
    """The tensors of the GGUF, in the order in which llama.cpp's converter writes them.

    Raise CheckpointError for one that is missing or misshaped, ConversionError for one too many.
    """
    return tensors.layout(checkpoint, architecture_of(checkpoint), configs.resolve(config))


def read_tensor(checkpoint: Checkpoint, tensor: Tensor, config: dict[str, Any]) -> torch.Tensor:
    """The values of one of ``layout``'s tensors, in the floating type in which they are stored.

    Holds little more than the result: a stack is filled part by part.
    """
    return tensors.read(checkpoint, tensor, configs.resolve(config))


def add_hyperparameters(
    writer: gguf.GGUFWriter, architecture: Architecture, config: dict[str, Any], file_type: int
) -> None:
    """Write the keys that begin with the architecture's name, and ``general.file_type``."""
    metadata.add_keys(writer, architecture, configs.resolve(config), file_type)
