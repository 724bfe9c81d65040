"""How a transformers checkpoint becomes the tensors and hyperparameters that llama.cpp expects.

One ``Architecture`` for each class of transformers. Names and metadata keys follow llama.cpp's
``convert_hf_to_gguf.py``, whose files ours equal (tests/integration/test_gguf_converter.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.errors import ConversionError

if TYPE_CHECKING:
    import gguf
    import torch

ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """``name`` is llama.cpp's. ``interleaved``: its rotary embedding pairs neighbouring channels,
    where transformers pairs the two halves of a head, so the rows of q and k change places."""

    name: str
    interleaved: bool


_LLAMA = Architecture("llama", interleaved=True)
SUPPORTED = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", interleaved=False),
}

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the GGUF: ``source`` is its name in the checkpoint (None: computed here),
    ``heads`` how many heads its rows are to be interleaved in."""

    name: str
    source: str | None
    shape: tuple[int, ...]
    heads: int | None = None


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """Raise ConversionError, with what to do, for a class of model that quantkit cannot convert."""
    name = checkpoint.architecture
    if name not in SUPPORTED:
        raise ConversionError(
            f"gguf: {checkpoint.id} is a {name}; quantkit converts {', '.join(SUPPORTED)}. "
            "llama.cpp's own converter knows more: git clone "
            "https://github.com/ggml-org/llama.cpp && pip install -r llama.cpp/requirements.txt "
            f"&& python llama.cpp/convert_hf_to_gguf.py {checkpoint.path} --outfile model.gguf; "
            "quantkit evaluates and serves the file it writes"
        )
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method")
        raise ConversionError(
            f"gguf: {checkpoint.id} is quantized already ({method}); convert the original weights"
        )
    return SUPPORTED[name]


def layout(checkpoint: Checkpoint, config: dict[str, Any]) -> list[Tensor]:
    """The tensors of the GGUF, in the order in which llama.cpp's converter writes them.

    Raise CheckpointError for one that is missing or misshaped, ConversionError for one too many.
    """
    architecture = architecture_of(checkpoint)
    shapes = _shapes(config, architecture)
    checkpoint.check_shapes({name: shapes[name] for name in _required(config, shapes)})
    tensors = []
    if factors := rope_factors(config):
        tensors.append(Tensor(ROPE_FREQS, None, (len(factors),)))
    for info in sorted(checkpoint.tensors.values(), key=lambda info: (info.shard, info.name)):
        if info.name.endswith(".rotary_emb.inv_freq"):
            continue  # a buffer that old checkpoints stored; it follows from the config
        if info.name not in shapes:
            raise ConversionError(
                f"gguf: {info.shard}: {info.name} is not a tensor of {checkpoint.architecture} "
                "as config.json describes it"
            )
        checkpoint.check_shapes({info.name: shapes[info.name]})
        heads = _heads(info.name, config) if architecture.interleaved else None
        tensors.append(Tensor(_gguf_name(info.name), info.name, info.shape, heads))
    return tensors


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from halves (0 … d/2, d/2 … d) to pairs (0, d/2, 1, d/2+1 …).

    rows: (heads * head_dim, ...).
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def rope_factors(config: dict[str, Any]) -> list[float]:
    """Llama 3.1's frequency factors, (head_dim / 2); empty where the model has none.

    llama.cpp divides each rotary frequency by its factor. Short wavelengths are kept, long ones
    slowed by ``factor``, those between interpolated (transformers: ``rope_type: llama3``).
    """
    import torch

    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return []
    dim = _head_dim(config)
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim))
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    trained = rope["original_max_position_embeddings"]

    def slowed(frequency: torch.Tensor) -> float:
        wavelength = 2 * math.pi / frequency
        if wavelength < trained / high:
            return 1.0
        if wavelength > trained / low:
            return float(factor)
        smooth = (trained / wavelength - low) / (high - low)
        return float(1 / ((1 - smooth) / factor + smooth))

    return [slowed(frequency) for frequency in frequencies]


def add_hyperparameters(
    writer: gguf.GGUFWriter, architecture: Architecture, config: dict[str, Any], file_type: int
) -> None:
    """Write the ``llama.*`` or ``qwen2.*`` keys; ``config`` as transformers resolves it.

    Raise ConversionError for what llama.cpp has no key for.
    """
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    _add_rope(writer, _rope(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_file_type(file_type)
    if architecture is _LLAMA:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(_head_dim(config))


def check_config(config: dict[str, Any]) -> None:
    """Raise ConversionError for a model that llama.cpp would compute differently."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ConversionError(f"gguf: hidden_act {activation!r}: llama.cpp computes silu only")
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise ConversionError(
            f"gguf: rope_type {kind!r} has no counterpart in llama.cpp for this architecture; "
            "default, linear, yarn and llama3 have"
        )


def _add_rope(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    import gguf

    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    if rope.get("rope_theta") is not None:
        writer.add_rope_freq_base(rope["rope_theta"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or {}


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _shapes(config: dict[str, Any], architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config may hold, and its shape."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * _head_dim(config)
    kv = config["num_key_value_heads"] * _head_dim(config)
    linears = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}{norm}.weight"] = (hidden,)
        for linear, shape in linears.items():
            shapes[f"{block}{linear}.weight"] = shape
            if _has_bias(linear, config, architecture):
                shapes[f"{block}{linear}.bias"] = shape[:1]
    return shapes


def _has_bias(linear: str, config: dict[str, Any], architecture: Architecture) -> bool:
    if architecture.name == "qwen2":
        return linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return bool(config.get("mlp_bias" if linear.startswith("mlp.") else "attention_bias"))


def _required(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """All, except an output layer of its own where it is tied to the embedding."""
    tied = config.get("tie_word_embeddings", False)
    return [name for name in shapes if not (tied and name == "lm_head.weight")]


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    index, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{_BLOCK[part]}.{kind}"


def _heads(name: str, config: dict[str, Any]) -> int | None:
    if ".q_proj." in name:
        return int(config["num_attention_heads"])
    if ".k_proj." in name:
        return int(config["num_key_value_heads"])
    return None
