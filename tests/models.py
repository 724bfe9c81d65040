"""Tiny seeded checkpoints, made from a transformers config, with a real trained tokenizer."""

from __future__ import annotations

import functools
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

VOCABULARY = 1024


@functools.cache
def _tokenizer_json() -> str:
    """A byte-level BPE in SmolLM2's manner (digits apart), trained on Python's own manual."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer.to_str()


def write_tokenizer(directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json of the small trained tokenizer."""
    (directory / "tokenizer.json").write_text(_tokenizer_json())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "chat_template": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def begin_with_bos(directory: Path) -> None:
    """Let the small tokenizer begin texts with its BOS, as Llama 3's does: by a post-processor."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    path.write_text(json.dumps(tokenizer))


def add_tokens(directory: Path, added: dict[int, str]) -> None:
    """Let tokens of the small tokenizer's vocabulary be special ones of other names."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = {id_: text for text, id_ in tokenizer["model"]["vocab"].items()}
    gone = {vocabulary[id_] for id_ in added}
    tokenizer["model"]["vocab"] = {text: id_ for id_, text in (vocabulary | added).items()}
    tokenizer["model"]["merges"] = [
        merge for merge in tokenizer["model"]["merges"] if gone.isdisjoint((*merge, "".join(merge)))
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": id_, "content": text, "special": True, **flags} for id_, text in added.items()
    ]
    path.write_text(json.dumps(tokenizer))


def make_checkpoint(
    directory: Path,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    seed: int = 0,
    random_vectors: bool = False,
    **config: Any,
) -> Path:
    """Write a random model of ``family`` (a transformers ``model_type``) and its tokenizer.

    Two layers, hidden 256, intermediate 512, 4 query and 2 key/value heads of 64, tied
    embeddings, as far as the family knows these settings and unless ``config`` says otherwise. A
    few input channels are made loud, as in real models, so that activation-aware methods have
    something to find. ``random_vectors``: no norm or bias is left as it is initialized, with all
    its elements alike. Tensors have the names of checkpoints on the hub: one for each expert.
    """
    directory.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.05,
        "rms_norm_eps": 1e-5,
    }
    known = AutoConfig.for_model(family)
    settings = {key: value for key, value in defaults.items() if hasattr(known, key)} | config
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("layernorm.weight"):
            tensor[torch.randperm(tensor.numel())[:8]] *= 8
        if name.endswith("proj.bias"):
            tensor.normal_(0, 0.1)
    for tensor in state.values():
        if random_vectors and tensor.ndim == 1:
            tensor += torch.randn(tensor.shape) * 0.1
    for name in model.all_tied_weights_keys:
        del state[name]
    state = revert_weight_conversion(model, state)
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(directory)
    names = sorted(state)
    if shards == 1:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for index in range(shards):
            file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: state[name] for name in names[index::shards]}
            weight_map.update(dict.fromkeys(part, file))
            save_file(part, directory / file, metadata={"format": "pt"})
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    write_tokenizer(directory)
    return directory


def make_noisy(directory: Path, noise: float) -> Path:
    """``make_checkpoint``'s Llama with seeded noise of that size on its weights."""
    path = make_checkpoint(directory)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        tensor += noise * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
