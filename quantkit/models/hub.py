"""Checkpoints from the Hugging Face hub, and which of their files are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkit.errors import CheckpointError, first_line
from quantkit.models.chat_template import NAMED
from quantkit.models.weight_files import INDEX, NOT_OF_THE_MODEL

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SIDECARS = (*_TOKENIZER_FILES, "generation_config.json", f"{NAMED}/*.jinja")
"""Patterns of what makes a model beside its weights and config.json."""
_SETTINGS = ("config.json", "quantize_config.json", "quant_config.json", "adapter_config.json")
_WANTED = ("*.safetensors", INDEX, *_SETTINGS, *SIDECARS)
_UNWANTED = (*NOT_OF_THE_MODEL, "*/*.safetensors*")
_OF_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", *SIDECARS)


def names_hub(text: str) -> bool:
    """Whether ``text`` can be a hub id: ``org/name``, with or without ``@revision``."""
    return not text.startswith((".", "/", "~")) and text.count("/") == 1


def download(text: str) -> Path:
    """Fetch a checkpoint's snapshot into huggingface_hub's own cache: no code, no pickle.

    Returns its directory, which is named after its commit. Raise CheckpointError with what the hub
    said.
    """
    return _download(text, _WANTED, _UNWANTED)


def download_adapter(text: str) -> Path:
    """Likewise, of a LoRA adapter."""
    return _download(text, _OF_ADAPTER, ())


def _download(text: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = text.partition("@")
    try:
        found = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=list(wanted),
            ignore_patterns=list(unwanted),
        )
    except Exception as error:  # network, authorization, unknown id: the hub has a class for each
        raise CheckpointError(
            f"{name}: not a local directory, and the hub said: {first_line(error)}"
        ) from error
    return Path(found)
