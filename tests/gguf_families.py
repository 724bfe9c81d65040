"""The families whose tokenizers the GGUF converter knows: how each comes, and in which model.

Embeddings have more rows than there are tokens where the real ones have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import normalizers
from transformers import AutoConfig

from tests.gguf_tokenizers import (
    DEEPSEEK_LLM,
    DIGITS,
    GPT_2,
    GPT_4O,
    LLAMA_3,
    QWEN_2,
    TEKKEN,
    pieces_of,
    write_byte_level,
    write_pieces,
)


@dataclass(frozen=True)
class Family:
    """``write(models, directory)`` makes the tokenizer's files from llama.cpp's ``models/``.
    ``pre``: its ``tokenizer.ggml.pre``. ``probed``: whether llama.cpp's converter knows it, which
    it does by its vocabulary."""

    model_type: str
    architecture: str
    rows: int
    pre: str
    write: Callable[[Path, Path], int]
    config: dict[str, Any] = field(default_factory=dict)
    probed: bool = True


def byte_level(name: str, *arguments: Any, **settings: Any) -> Callable[[Path, Path], int]:
    def write(models: Path, directory: Path) -> int:
        vocabulary = models / f"ggml-vocab-{name}.gguf"
        return write_byte_level(vocabulary, directory, *arguments, **settings)

    return write


def pieces(
    name: str, rename: dict[str, str] | None = None, *, like_llama: bool, **settings: Any
) -> Callable[[Path, Path], int]:
    def write(models: Path, directory: Path) -> int:
        vocabulary = models / f"ggml-vocab-{name}.gguf"
        model = pieces_of(vocabulary, rename, like_llama=like_llama)
        return write_pieces(model, directory, like_llama=like_llama, **settings)

    return write


NFC = normalizers.NFC()
_END = "<|endoftext|>"
_ENDS = {"bos_token": _END, "eos_token": _END, "unk_token": _END, "add_prefix_space": False}
_BEGIN_3, _END_3 = "<|begin_of_text|>", "<|end_of_text|>"
_BEGIN_DEEPSEEK, _END_DEEPSEEK = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"  # noqa: RUF001
_CL100K = 100256
"""OpenAI's cl100k is the first part of Llama 3's vocabulary; many models have it."""

_llama_3 = partial(byte_level, "llama-bpe", bos_token=_BEGIN_3, eos_token=_END_3)
_qwen = partial(
    byte_level,
    "qwen2",
    QWEN_2,
    normalizer=NFC,
    tokenizer_class="Qwen2Tokenizer",
    eos_token="<|im_end|>",
    pad_token=_END,
    bos_token=None,
    unk_token=None,
    add_bos_token=False,
    add_prefix_space=False,
)
_cl100k = partial(byte_level, "llama-bpe", cut=_CL100K, tokenizer_class="GPT2Tokenizer")
_llama_2 = partial(
    pieces, "llama-spm", like_llama=True, tokenizer_class="LlamaTokenizer", legacy=False
)
_gemma = partial(
    pieces,
    "gemma-4",
    {"<|turn>": "<start_of_turn>", "<turn|>": "<end_of_turn>"},
    like_llama=False,
    bos="<bos>",
    eos="<eos>",
    control=("<pad>", "<start_of_turn>", "<end_of_turn>", "<|tool_response>"),
    plain=(
        *("<mask>", "<unused0>", "<h1>"),
        *("\n" * n for n in range(1, 32)),
        *("▁" * n for n in range(2, 32)),
        *("\t" * n for n in range(1, 32)),
    ),
    pad_token="<pad>",
    tokenizer_class="GemmaTokenizer",
)

FAMILIES: dict[str, Family] = {
    "Llama-2": Family("llama", "LlamaForCausalLM", 32000, "default", _llama_2()),
    "Llama-3.1": Family(
        "llama",
        "LlamaForCausalLM",
        128256,
        "llama-bpe",
        _llama_3(LLAMA_3, ignore_merges=True, begin=_BEGIN_3),
        {"bos_token_id": 128000, "eos_token_id": [128001, 128009]},
    ),
    "Mistral-7B-v0.3": Family(
        "mistral",
        "MistralForCausalLM",
        32768,
        "default",
        _llama_2(control=("[INST]", "[/INST]"), plain=("[TOOL]",), add_prefix_space=True),
    ),
    "Mistral-Nemo": Family(
        "mistral",
        "MistralForCausalLM",
        131072,
        "tekken",
        _llama_3(TEKKEN, ignore_merges=True, begin=_BEGIN_3, tokenizer_class="GPT2Tokenizer"),
        {"bos_token_id": 128000, "eos_token_id": 128001},
        probed=False,
    ),
    "Mixtral-8x7B": Family("mixtral", "MixtralForCausalLM", 32000, "default", _llama_2()),
    "Qwen2.5": Family(
        "qwen2", "Qwen2ForCausalLM", 152064, "qwen2", _qwen(), {"bos_token_id": 151643}
    ),
    "Qwen3": Family(
        "qwen3", "Qwen3ForCausalLM", 151936, "qwen2", _qwen(plain=("<think>", "</think>"))
    ),
    "Qwen3-MoE": Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", 151936, "qwen2", _qwen(plain=("<think>", "</think>"))
    ),
    "Gemma-2": Family("gemma2", "Gemma2ForCausalLM", 262144, "default", _gemma()),
    "Gemma-3": Family("gemma3_text", "Gemma3ForCausalLM", 262208, "default", _gemma()),
    "Phi-3-mini": Family(
        "phi3",
        "Phi3ForCausalLM",
        32064,
        "default",
        pieces(
            "phi-3",
            like_llama=True,
            eos=_END,
            control=("<|assistant|>", "<|placeholder1|>", "<|end|>", "<|user|>"),
            plain=("</s>",),
            pad_token=_END,
            tokenizer_class="LlamaTokenizer",
            legacy=False,
        ),
    ),
    "Phi-4": Family(
        "phi3",
        "Phi3ForCausalLM",
        100352,
        "dbrx",
        _cl100k(
            LLAMA_3,
            extra=("<|dummy_0|>", _END, "<|im_start|>", "<|im_end|>", "<|im_sep|>"),
            bos_token=_END,
            eos_token="<|im_end|>",
            add_prefix_space=False,
        ),
        {"bos_token_id": 100257, "eos_token_id": 100259, "pad_token_id": 100257},
    ),
    "Phi-4-mini": Family(
        "phi3",
        "Phi3ForCausalLM",
        50304,
        "gpt-4o",
        byte_level(
            "gpt-2", GPT_4O, bos_token=_END, eos_token=_END, tokenizer_class="GPT2Tokenizer"
        ),
        {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256},
        probed=False,
    ),
    "GPT-2": Family(
        "gpt2",
        "GPT2LMHeadModel",
        50257,
        "gpt-2",
        byte_level("gpt-2", GPT_2, tokenizer_class="GPT2Tokenizer", **_ENDS),
        {"n_ctx": 1024},
    ),
    "Pythia": Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        50304,
        "olmo",
        byte_level("gpt-neox", GPT_2, tokenizer_class="GPTNeoXTokenizer", normalizer=NFC, **_ENDS),
        {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "OLMo-2": Family(
        "olmo2",
        "Olmo2ForCausalLM",
        100352,
        "dbrx",
        _cl100k(
            LLAMA_3,
            extra=("<|extra_id_0|>", _END, "<|fim_prefix|>", "<|pad|>"),
            plain=("|||PHONE_NUMBER|||",),
            pad_token="<|pad|>",
            **_ENDS,
        ),
        {"eos_token_id": 100257, "pad_token_id": 100259},
    ),
    "Granite-3": Family(
        "granite",
        "GraniteForCausalLM",
        49216,
        "refact",
        byte_level("refact", DIGITS, pad_token=_END, add_bos_token=False, **_ENDS),
        {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    ),
    "StableLM-2": Family(
        "stablelm",
        "StableLmForCausalLM",
        100352,
        "stablelm2",
        _cl100k(QWEN_2, extra=("<|reg_extra|>", _END, "<|fim_prefix|>"), pad_token=_END, **_ENDS),
        {"bos_token_id": 100257, "eos_token_id": 100257},
    ),
    "DeepSeek-V2-Lite": Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        102400,
        "deepseek-llm",
        byte_level(
            "deepseek-llm",
            DEEPSEEK_LLM,
            normalizer=normalizers.Sequence([]),
            begin=_BEGIN_DEEPSEEK,
            bos_token={"__type": "AddedToken", "content": _BEGIN_DEEPSEEK, "normalized": True},
            eos_token={"__type": "AddedToken", "content": _END_DEEPSEEK, "normalized": True},
            pad_token={"__type": "AddedToken", "content": _END_DEEPSEEK, "normalized": True},
            add_bos_token=True,
            add_eos_token=False,
            tokenizer_class="LlamaTokenizerFast",
        ),
        {"bos_token_id": 100000, "eos_token_id": 100001},
    ),
}


def write_checkpoint(family: Family, source: Path, directory: Path) -> Path:
    """What a tokenizer is converted from: its files, the model's config, and no weights to speak
    of. ``source``: llama.cpp's."""
    directory.mkdir(parents=True)
    assert family.write(source / "models", directory) <= family.rows
    config = AutoConfig.for_model(
        family.model_type,
        **{"vocab_size": family.rows, "architectures": [family.architecture]} | family.config,
    )
    config.save_pretrained(directory)
    save_file({"model.norm.weight": torch.ones(1)}, directory / "model.safetensors")
    return directory
