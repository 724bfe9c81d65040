"""A checkpoint's configuration as transformers reads it, in a third of the time.

transformers writes docstrings when it defines a class of configurations, and to name one class in
them it imports what all its models are made of: two seconds, and 150 MB. It leaves the name out
where that import fails, so here it fails.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, reading
from quantkit.system.json_file import read_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MODELS = "transformers.models.auto.modeling_auto"
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    *("n_embd", "n_inner", "n_layer", "n_head", "n_positions"),
)
"""Settings that are positive whole numbers, where a model has them at all; GPT-2's names last."""
_LARGEST = 2**31 - 1
_POSITIVE = ("rope_theta", "factor", "original_max_position_embeddings")
"""Keys of rotary embeddings."""
_NAMES = ("model_type", "rope_type", "hidden_act", "hidden_activation", "activation_function")
_REPEATED = ("num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts")
"""How many times a model has something with weights of its own."""


def read_config(directory: Path) -> PretrainedConfig:
    """Raise CheckpointError where transformers knows no such model, and for a value that makes no
    sense; the checkpoint's own code is refused."""
    from transformers import AutoConfig

    file = directory / "config.json"
    _check(read_object(file), file)
    read = partial(AutoConfig.from_pretrained, directory, trust_remote_code=False)
    with reading(file):
        try:
            with _without_models():
                config = read()
        except ImportError:  # of a version that minds
            config = read()
    return config


def _check(written: Any, file: Path, place: str = "") -> None:
    """Raise CheckpointError for a value, at any depth, that transformers may let pass and no model
    has; types are transformers' own to check."""
    if isinstance(written, list):
        written = dict(enumerate(written))
    for key, value in written.items() if isinstance(written, dict) else ():
        where = f"{place}{key}"
        if isinstance(value, float) and math.isnan(value):
            raise CheckpointError(f"{file}: {where} is NaN, which is no value")
        of_the_model = place in ("", "text_config.")
        if of_the_model and key in _COUNTS and type(value) is int:
            _check_count(value, file, where)
        positive = isinstance(value, int | float) and 0 < value < math.inf
        of_rope = key == "rope_theta" or "rope" in place
        if of_rope and key in _POSITIVE and value is not None and not positive:
            raise CheckpointError(f"{file}: {where} is {value!r}, expected a positive number")
        named = of_the_model or of_rope
        if named and key in _NAMES and value is not None and not isinstance(value, str):
            raise CheckpointError(f"{file}: {where} is {value!r}, expected a name")
        if key == "quantization_config" and value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{file}: {where} is {value!r}, expected an object")
        if key in ("rope_theta", "rope_type") and value is None and place:
            raise CheckpointError(f"{file}: {where} is null")
        _check(value, file, f"{where}.")


def _check_count(value: Any, file: Path, key: str) -> None:
    if type(value) is not int or not 0 < value <= _LARGEST:
        raise CheckpointError(f"{file}: {key} is {value!r}, expected a positive whole number")


def check_repeated(config: PretrainedConfig, file: Path, most: int) -> None:
    """Raise CheckpointError where the model would have more layers, or experts in one, than there
    can be weights for (``most``): to build it would take for ever."""
    text = config.get_text_config()
    for key in _REPEATED:
        value = getattr(text, key, None)
        if isinstance(value, int) and value > most:
            raise CheckpointError(
                f"{file}: {key} is {value}, but there are weights for {most} at most"
            )


def setting(directory: Path, name: str) -> Any:
    """What config.json says of the language model, by transformers' name; None where nothing does.

    transformers, whose import takes seconds, is asked only where the file itself does not say it
    under that name: of GPT-2, or of a model that also sees.
    """
    written = read_object(directory / "config.json")
    if name in written:
        return written[name]
    return getattr(read_config(directory).get_text_config(), name, None)


def count(directory: Path, name: str) -> int:
    """A ``setting`` that is a positive whole number; raise CheckpointError where it is not."""
    value = setting(directory, name)
    _check_count(value, directory / "config.json", name)
    return int(value)


@contextmanager
def _without_models() -> Iterator[None]:
    if _MODELS in sys.modules:
        yield
        return
    sys.modules[_MODELS] = None  # type: ignore[assignment]  # how Python marks what cannot be had
    try:
        yield
    finally:
        del sys.modules[_MODELS]


def attention(config: PretrainedConfig) -> str | None:
    """Which of transformers' implementations computes what the config says: the one that it takes
    for the model by itself (None), but where scores have a soft cap (Gemma 2), which torch's own
    has not and transformers then leaves out."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None
