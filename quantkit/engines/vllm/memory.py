"""How much memory vLLM is given: on the CPU for its KV cache, on a GPU for all that it holds.

By itself vLLM takes 92 % of every GPU, whatever the model needs, so that no second engine fits.
https://docs.vllm.ai/en/latest/configuration/conserving_memory.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from quantkit.engines.server import ServeOptions
from quantkit.errors import EngineError, RecipeError
from quantkit.formats import format_of
from quantkit.models.engine_config import Option
from quantkit.models.hf_config import count, setting
from quantkit.models.variant import Model
from quantkit.system.cards import Card
from quantkit.system.json_file import read_object
from quantkit.system.progress import say
from quantkit.system.sizes import gibibytes

KV_BLOCK = 128
"""Tokens in a block of vLLM's cache on the CPU; on a GPU a multiple of its blocks."""
_KV_BYTES = 2
"""Bytes of one element of the KV cache (bf16)."""
_OVERHEAD = 3 << 30
"""Bytes on each GPU beside weights and cache: CUDA's own, activations, captured graphs."""
_TAKEN_FIRST = 1 << 30
"""Of these, what CUDA has taken when vLLM looks how much is free."""
_USUAL_REQUEST = 2048
"""Tokens for which each slot has room on a GPU where no context is given."""
_STATE = 64 << 20
"""Bytes that recurrent layers (Mamba, linear attention) keep of a request, in a large model."""
_RECURRENT = ("mamba_", "linear_", "ssm_", "conv_")
"""How settings of such layers begin in config.json."""
_DECIDED = frozenset({"gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override"})
"""With one of these the user divides the memory."""


def cache_bytes(model: Model, options: ServeOptions) -> int:
    """Bytes of the keys and values of ``slots`` requests of full context, in whole blocks.

    Where the context is the model's own, for one such request: many are never that long.
    """
    context, requests = options.context, options.slots
    if context is None:
        context, requests = format_of(model).context_length(model), 1
    blocks = max(_blocks(context) * requests, _blocks(options.longest or 0))
    return (blocks + 1) * _block_bytes(model)  # vLLM keeps one for itself


def on_cards(
    model: Model, options: ServeOptions, own: Mapping[str, Option], cards: list[Card]
) -> list[str]:
    """The arguments that make vLLM take what the model needs of each of these GPUs, and no more;
    none where the user has decided, or no GPU tells its memory.

    Of a model with recurrent layers vLLM itself divides its share into cache and states. The cache
    is smaller where less is free: requests then wait for one another. Raise EngineError where there
    is not room for one of full context, with what the memory is for.
    """
    if _DECIDED & own.keys():
        return []
    tensor, pipeline = _parallel(own)
    used = cards[: tensor * pipeline]  # those of other machines are taken to be alike
    if not used:
        return []
    free, total = min(card.free for card in used), min(card.total for card in used)
    weights = model.bytes // (tensor * pipeline)
    parts = min(tensor, _kv_heads(model)) * pipeline  # a head that does not divide is repeated
    least = cache_bytes(model, replace(options, slots=1)) // parts
    usual = options if options.context else replace(options, context=_USUAL_REQUEST)
    wanted = max(least, cache_bytes(model, usual) // parts)
    recurrent = _is_recurrent(model)
    if recurrent:
        least, wanted = least + _STATE, wanted + _STATE * options.slots
    cache = max(least, min(wanted, free - weights - _OVERHEAD))
    planned = weights + cache + _OVERHEAD
    if planned > free:
        raise EngineError(
            f"{model.id}: vllm needs {gibibytes(planned)} of a GPU ({gibibytes(weights)} of "
            f"weights, {gibibytes(cache)} of cache, {gibibytes(_OVERHEAD)} beside them), and "
            f"{gibibytes(free)} of {gibibytes(total)} are free; lower the context, or stop what "
            "else runs on it"
        )
    if cache < wanted:
        say(
            f"{model.id}: {gibibytes(cache)} of the GPU are free for vllm's cache, and "
            f"{options.slots} requests can take {gibibytes(wanted)}: some will wait"
        )
    # With a cache of a given size, this share only has to be free when vLLM starts.
    share = (planned - _TAKEN_FIRST) / total
    exactly = [] if recurrent else ["--kv-cache-memory-bytes", str(cache)]
    return [*exactly, "--gpu-memory-utilization", f"{share:.4f}"]


def _parallel(own: Mapping[str, Option]) -> tuple[int, int]:
    """The number of GPUs among which each layer is divided, and that of groups of layers."""
    sizes = {name: own.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size")}
    try:
        tensor, pipeline = (int(size) for size in sizes.values())
    except ValueError as error:
        raise RecipeError(f"vllm: expected whole numbers, not {sizes}") from error
    if tensor < 1 or pipeline < 1:
        raise RecipeError(f"vllm: expected whole numbers above 0, not {sizes}")
    return tensor, pipeline


def _is_recurrent(model: Model) -> bool:
    config = read_object(model.path / "config.json")
    text = config.get("text_config", config)
    return any(name.startswith(_RECURRENT) for name in text)


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK)


def _block_bytes(model: Model) -> int:
    say = partial(count, model.path)
    layers, heads = say("num_hidden_layers"), say("num_attention_heads")
    width = say("head_dim") if setting(model.path, "head_dim") else say("hidden_size") // heads
    return KV_BLOCK * 2 * layers * _kv_heads(model) * width * _KV_BYTES


def _kv_heads(model: Model) -> int:
    grouped = setting(model.path, "num_key_value_heads")
    return count(model.path, "num_key_value_heads" if grouped else "num_attention_heads")
