"""A checkpoint's configuration as transformers reads it, in a third of the time.

transformers writes docstrings when it defines a class of configurations, and to name one class in
them it imports what all its models are made of: two seconds, and 150 MB. It leaves the name out
where that import fails, so here it fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_MODELS = "transformers.models.auto.modeling_auto"


def read_config(directory: Path) -> PretrainedConfig:
    """Raise what transformers raises; a checkpoint's own code is refused."""
    from transformers import AutoConfig

    try:
        with _without_models():
            return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except ImportError:  # of a version that minds
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


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
