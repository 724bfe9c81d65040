"""Whether llama.cpp knows what a GGUF holds, asked before there are weights in it."""

from __future__ import annotations

import os
from pathlib import Path

import llama_cpp

from quantkit.engines.llamacpp.context import listen, reason
from quantkit.engines.llamacpp.vocabulary import Vocabulary
from quantkit.errors import EngineError


def refusal(path: Path) -> str | None:
    """Why llama.cpp does not load the file; None where it does.

    Its tensors' data are not read: a hole in their place will do. Raise CheckpointError for a
    vocabulary over which it would abort.
    """
    try:
        with Vocabulary(path):
            pass
    except EngineError:
        return reason()
    listen()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.use_mmap = True
    settings.use_extra_bufts = False  # these hold the weights in another order, so read them
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), settings)
    if not model:
        return reason()
    llama_cpp.llama_model_free(model)
    return None
