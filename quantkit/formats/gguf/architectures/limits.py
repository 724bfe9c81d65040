"""What llama.cpp computes whatever a configuration says, as its ``src/models/`` have it.

Where a model asks for something else, llama.cpp's converter says nothing, and the file is another
model's; or llama.cpp does not load it.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator

from quantkit.errors import ConversionError
from quantkit.formats.gguf.architectures.architecture import Architecture, Config
from quantkit.formats.gguf.architectures.rope import longrope_attention_factor

SILU = {"hidden_act": ("silu", "swish")}
GELU = {"hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")}
"""Activations that llama.cpp computes as GELU's tanh approximation."""
UNTIED = {"tie_word_embeddings": False}

SCALED = ("default", "linear", "yarn")
"""Types of rotary embeddings that are only metadata."""

_ROUNDED_YARN = ("gpt-oss",)
"""Where a YaRN that begins and ends between two channels is let pass: no other gpt-oss is there,
and llama.cpp's differs from it by less than one channel."""


def windows(c: Config, every: int) -> list[str]:
    """``layer_types`` where each block has a window, but for one in ``every``."""
    blocks = range(1, c["num_hidden_layers"] + 1)
    return ["sliding_attention" if block % every else "full_attention" for block in blocks]


def gemma_scalar(c: Config, blocks_of_27b: int) -> int:
    """The size whose inverse square root scales Gemma's attention."""
    largest = c["num_hidden_layers"] == blocks_of_27b
    return int(c["hidden_size"] // c["num_attention_heads"] if largest else c["head_size"])


def deepseek2_queries(c: Config) -> int | str | None:
    """Which models have queries without a latent it knows by their number of blocks."""
    if c["num_hidden_layers"] in (26, 27):
        return None
    return c["q_lora_rank"] or "a rank where there are neither 26 nor 27 blocks"


def check(architecture: Architecture, c: Config) -> None:
    """Raise ConversionError for a model that llama.cpp would compute differently."""
    name = architecture.name
    for key, expected in architecture.computes.items():
        wanted = expected(c) if callable(expected) else expected
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if key in c and c[key] not in allowed:
            one_of = " or ".join(map(_show, allowed))
            raise ConversionError(
                f"gguf: {key} {_show(c[key])}: llama.cpp computes {name} with {one_of} "
                "only, which would be another model"
            )
    rope, types = c["rope"], architecture.rope_types
    kind = rope.get("rope_type", "default")
    if kind not in types:
        known = f"{', '.join(types[:-1])} and {types[-1]} have" if types[1:] else f"{types[0]} has"
        raise ConversionError(
            f"gguf: rope_type {kind!r} has no counterpart in llama.cpp for this architecture "
            f"({name}); {known}"
        )
    if kind in ("linear", "yarn") and rope.get("factor") is None:
        raise ConversionError(f"gguf: rope_type {kind!r} without a factor; add it to config.json")
    for key in _overruled(name, kind, c):
        raise ConversionError(
            f"gguf: {key} {rope.get(key)!r} of rope_type {kind!r}: llama.cpp computes {name} with "
            "a rule of its own in its place, which would be another model"
        )


def _show(value: object) -> str:
    return reprlib.repr(value) if isinstance(value, list) else repr(value)


def _overruled(name: str, kind: str, c: Config) -> Iterator[str]:
    """Parameters of rotary embeddings that differ from what llama.cpp takes in their place."""
    rope = c["rope"]
    usual: float | None = None
    if kind == "yarn":
        usual = 0.1 * math.log(rope["factor"]) + 1
        if not rope.get("truncate", True) and name not in _ROUNDED_YARN:
            yield "truncate"
        one, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        # Of some it reads the second only, and takes it for both.
        reads = name in ("deepseek2", "mistral3")
        if (one != all_dim or not one) if reads else (one and all_dim):
            yield "mscale"
    if kind == "longrope":
        usual = longrope_attention_factor(c)
        scale = c["max_position_embeddings"] / rope["original_max_position_embeddings"]
        if rope.get("factor") not in (None, scale):
            yield "factor"
    given = rope.get("attention_factor")
    if usual and given and not math.isclose(given, usual):
        yield "attention_factor"
