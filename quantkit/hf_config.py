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
from quantkit.json_file import read_object

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
)
"""Settings that are positive whole numbers, where a model has them at all."""
_LARGEST = 2**31 - 1
_POSITIVE_IN_ROPE = ("rope_theta", "factor", "original_max_position_embeddings")


def read_config(directory: Path) -> PretrainedConfig:
    """Raise CheckpointError where transformers knows no such model, and for a value that makes no
    sense; the checkpoint's own code is refused."""
    from transformers import AutoConfig

    file = directory / "config.json"
    _refuse_nan(read_object(file), file)
    read = partial(AutoConfig.from_pretrained, directory, trust_remote_code=False)
    with reading(file):
        try:
            with _without_models():
                config = read()
        except ImportError:  # of a version that minds
            config = read()
        _check(config.get_text_config(), file)
    return config


def _refuse_nan(value: Any, file: Path, key: str = "") -> None:
    if isinstance(value, float) and math.isnan(value):
        raise CheckpointError(f"{file}: {key} is NaN, which is no value")
    parts = value.items() if isinstance(value, dict) else ()
    parts = enumerate(value) if isinstance(value, list) else parts
    for name, part in parts:
        _refuse_nan(part, file, f"{key}.{name}" if key else str(name))


def _check(config: PretrainedConfig, file: Path) -> None:
    """Raise CheckpointError for sizes that no model has, which transformers lets pass."""
    written = config.attribute_map or {}
    for name in _COUNTS:
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, list | tuple):  # some have one for each layer
            _check_count(value, file, written.get(name, name))
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        for key in _POSITIVE_IN_ROPE:
            value = kind.get(key)
            number = isinstance(value, int | float) and 0 < value < math.inf
            if value is not None and not number:
                raise CheckpointError(f"{file}: {key} is {value!r}, expected a positive number")


def _check_count(value: Any, file: Path, key: str) -> None:
    if type(value) is not int or not 0 < value <= _LARGEST:
        raise CheckpointError(f"{file}: {key} is {value!r}, expected a positive whole number")


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


def attention(config: PretrainedConfig) -> str:
    """Which of transformers' implementations computes what the config says: torch's own, but where
    scores have a soft cap (Gemma 2), which that has not and transformers then leaves out."""
    capped = getattr(config, "attn_logit_softcapping", None)
    return "eager" if capped else "sdpa"
