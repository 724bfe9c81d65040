"""The language model of a checkpoint that also sees or hears."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from quantkit.models.tied_weights import KEY

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from quantkit.models.checkpoint import Checkpoint


def is_part(checkpoint: Checkpoint) -> bool:
    """Whether the language model is a part of the checkpoint, described by ``text_config``."""
    return isinstance(checkpoint.config.get("text_config"), dict)


def text_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of the language model: ``text_config``, or the checkpoint's own.

    The whole model's configuration says whether its output layer is tied; transformers leaves it
    apart where it is stored.
    """
    whole = checkpoint.hf_config
    if not is_part(checkpoint):
        return whole
    text = copy.deepcopy(whole.get_text_config(decoder=True))
    stored = any(name.endswith("lm_head.weight") for name in checkpoint.tensors)
    text.tie_word_embeddings = bool(getattr(whole, KEY, False)) and not stored
    return text
