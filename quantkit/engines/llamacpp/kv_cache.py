"""The type in which llama.cpp keeps keys and values."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.errors import RecipeError, did_you_mean
from quantkit.models.engine_config import Option

DEFAULT = "f16"
KV_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""What ``llama-server --cache-type-k`` takes."""
_FLOATS = KV_CACHE_TYPES[:3]


def kv_cache_type(options: Mapping[str, Option]) -> str:
    """The option ``kv_cache``; raise RecipeError for a type that llama.cpp does not have."""
    kind = str(options.get("kv_cache", DEFAULT))
    if kind not in KV_CACHE_TYPES:
        raise RecipeError(
            f"llamacpp: kv_cache is {kind!r}; llama.cpp takes {', '.join(KV_CACHE_TYPES)}"
            + did_you_mean(kind, KV_CACHE_TYPES)
        )
    return kind


def needs_flash_attention(kind: str) -> bool:
    """Whether values of this type are read by flash attention alone."""
    return kind not in _FLOATS
