"""llama.cpp: scores GGUF in this process through llama-cpp-python, serves it with llama-server."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

from quantkit.engines.base import Capabilities, Scorer, check_format
from quantkit.engines.llamacpp.kv_cache import kv_cache_type
from quantkit.engines.llamacpp.server import load_seconds, server_command
from quantkit.engines.process import RunningServer
from quantkit.engines.server import ServeOptions, ServerCommand
from quantkit.errors import RecipeError
from quantkit.models.engine_config import Option
from quantkit.models.variant import Model
from quantkit.system import extras
from quantkit.toolchains import own
from quantkit.toolchains.llama_cpp_source import library_version
from quantkit.toolchains.llama_programs import find_llama_server

_OF_VLLM = {"tensor_parallel_size", "pipeline_parallel_size"}


class LlamaCpp:
    """Runs GGUF variants.

    Option ``kv_cache``: the type of keys and values, ``q8_0`` or another of ``KV_CACHE_TYPES``, in
    this process as in llama-server. All else is for llama-server alone.
    """

    name = "llamacpp"
    capabilities = Capabilities(
        formats=frozenset({"gguf"}),
        logits="full",
        serves=True,
        devices=("cpu", "cuda", "metal"),
        sums_choices=False,
    )

    def __init__(self, options: Mapping[str, Option] = MappingProxyType({})) -> None:
        self.options = options

    def version(self) -> str | None:
        """The version of llama-cpp-python, whose build makes library and server one, followed by
        that of the user's own server where there is one; None without the library."""
        library = library_version()
        if library is None:
            return None
        server = own.own(self.name)
        return f"{library} (llama-server {server.version})" if server else library

    def check(self, model: Model) -> None:
        """Raise ToolchainError where llama.cpp is missing, IncompatibleVariant if not GGUF."""
        if self.version() is None:
            raise extras.missing("llamacpp")
        check_format(self, model)
        kv_cache_type(self.options)
        for name in _OF_VLLM & self.options.keys():
            raise RecipeError(
                f"llamacpp: {name} is an option of vllm; llama-server divides a model among all "
                "GPUs by itself (its own options are split_mode and tensor_split)"
            )

    def scorer(self, model: Model, context: int) -> AbstractContextManager[Scorer]:
        """Load the GGUF file in this process."""
        from quantkit.engines.llamacpp.scorer import LlamaScorer

        self.check(model)
        scorer: AbstractContextManager[Scorer] = LlamaScorer(
            model, context, kv_cache_type(self.options)
        )
        return scorer

    def language_model(self, model: Model, context: int) -> AbstractContextManager[Scorer]:
        """The scorer: it writes as well."""
        return self.scorer(model, context)

    def server(self, model: Model, options: ServeOptions) -> ServerCommand:
        """llama-server with one slot for each request that may run at the same time."""
        self.check(model)
        return server_command(find_llama_server(), model, options, self.options)

    def attached(self, model: Model, server: RunningServer, context: int) -> None:  # noqa: ARG002
        """None: it scores in this process."""
        return

    def load_seconds(self, log: str) -> float | None:
        """From the first word of the model to its being loaded: weights, and a cache for them."""
        return load_seconds(log)
