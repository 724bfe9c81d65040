"""A checkpoint's configuration as transformers reads it, in a third of the time.

transformers writes docstrings when it defines a class of configurations, and to name one class in
them it imports what all its models are made of: two seconds, and 150 MB. It leaves the name out
where that import fails, so here it fails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MODELS = "transformers.models.auto.modeling_auto"


def read_config(directory: Path) -> PretrainedConfig:
    """Raise CheckpointError where transformers knows no such model; the checkpoint's own code is
    refused."""
    from transformers import AutoConfig

    read = partial(AutoConfig.from_pretrained, directory, trust_remote_code=False)
    try:
        try:
            with _without_models():
                return read()
        except ImportError:  # of a version that minds
            return read()
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{directory / 'config.json'}: {first_line(error)}") from error


def setting(directory: Path, name: str) -> Any:
    """What config.json says of the language model, by transformers' name; None where nothing does.

    transformers, whose import takes seconds, is asked only where the file itself does not say it
    under that name: of GPT-2, or of a model that also sees.
    """
    written = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if name in written:
        return written[name]
    return getattr(read_config(directory).get_text_config(), name, None)


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
