"""The names of formats, producers and engines, and where each is: a leaf, which imports nothing.

What is looked up is imported only then. Packages of others add engines and producers by entry
points: ``quantkit.engines`` and ``quantkit.producers``, each ``name = "module:Class"``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from quantkit.errors import RecipeError, ToolchainError, did_you_mean

Kind = Literal["format", "producer", "engine"]

NATIVE = "native"
"""The producer that is quantkit's own."""

FORMATS = {
    "gguf": "quantkit.formats.gguf:GGUF",
    "gptq": "quantkit.formats.gptq:GPTQ",
    "awq": "quantkit.formats.awq:AWQ",
    "compressed-tensors": "quantkit.formats.compressed_tensors:CompressedTensors",
}
SHORT = {"compressed-tensors": "ct"}
"""Of formats with long names, what begins the names of their variants."""
MADE_HERE = {
    "gguf": "quantkit.producers.native_gguf:NativeGGUF",
    "gptq": "quantkit.producers.native_gptq:NativeGPTQ",
    "awq": "quantkit.producers.native_awq:NativeAWQ",
    "compressed-tensors": ("quantkit.producers.native_compressed_tensors:NativeCompressedTensors"),
}
"""The native producers, by the format that each makes."""
PRODUCERS = {
    "auto-round": "quantkit.producers.packages:AutoRound",
    "autoawq": "quantkit.producers.packages:AutoAWQ",
    "auto-gptq": "quantkit.producers.packages:AutoGPTQ",
    "llm-compressor": "quantkit.producers.llm_compressor:LLMCompressor",
}
ENGINES = {
    "transformers": "quantkit.engines.transformers:Transformers",
    "llamacpp": "quantkit.engines.llamacpp:LlamaCpp",
    "vllm": "quantkit.engines.vllm:VLLM",
}
"""In the order in which they are asked whether they take a model; those of others come after."""


@cache
def registered(kind: Kind) -> Mapping[str, str]:
    """``module:Class`` by name: quantkit's own, then those of other packages."""
    if kind == "format":
        return FORMATS
    own = PRODUCERS if kind == "producer" else ENGINES
    others = _plugins(f"quantkit.{kind}s")
    return own | {name: target for name, target in others.items() if name not in own}


def check_name(kind: Kind, name: str, where: str = "") -> None:
    """Raise RecipeError, with the nearest name, where there is none such; ``where`` begins it."""
    known = registered(kind)
    if name not in known:
        raise RecipeError(
            f"{where}unknown {kind} {name!r}; {kind}s are {', '.join(known)}"
            + did_you_mean(name, known)
        )


def load(kind: Kind, name: str, *arguments: Any) -> Any:
    """An instance of the class of that name; raise RecipeError where there is none such."""
    check_name(kind, name)
    return instance(registered(kind)[name], *arguments)


def instance(target: str, *arguments: Any) -> Any:
    """An instance of ``module:Class``; raise ToolchainError where a plugin has no such class."""
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if module.partition(".")[0] == "quantkit":
            raise
        raise ToolchainError(f"plugin {target}: {error}; install it again, or remove it") from error
    return found(*arguments)


def _plugins(group: str) -> dict[str, str]:
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=group)}
