"""Tokenizers of the families that the GGUF converter knows, to put into tiny checkpoints."""

from __future__ import annotations

import functools
import io
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.pre_tokenizers import PreTokenizer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
SENTENCEPIECE_VOCABULARY = 1000


def split(number: str) -> PreTokenizer:
    """Llama 3's and Qwen2's pre-tokenizer, which differ in how they take digits apart."""
    regex = Regex(CONTRACTIONS + number + REST)
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(regex, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def write_llama_3(vocabulary: Path, directory: Path) -> int:
    """Llama 3's tokenizer, rebuilt from llama.cpp's ggml-vocab-llama-bpe.gguf; its size."""
    tokenizer = _from_gguf(vocabulary, ignore_merges=True)
    tokenizer.pre_tokenizer = split(r"\p{N}{1,3}")
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos}:1 $B:1", [(bos, 128000)]),
        ]
    )
    return _save(tokenizer, directory, bos_token=bos, eos_token="<|end_of_text|>")


def write_qwen2(vocabulary: Path, directory: Path) -> int:
    """Qwen2's tokenizer, rebuilt from llama.cpp's ggml-vocab-qwen2.gguf; its size."""
    tokenizer = _from_gguf(vocabulary, ignore_merges=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split(r"\p{N}")
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    end = "<|endoftext|>"
    return _save(tokenizer, directory, eos_token=end, pad_token=end, add_prefix_space=False)


def write_sentencepiece(directory: Path, *, keep_model: bool = True) -> None:
    """A Llama 2 tokenizer trained on Python's manual: tokenizer.json, and tokenizer.model too."""
    model = directory / "tokenizer.model"
    model.write_bytes(_sentencepiece_model())
    special = [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    tokenizer = Tokenizer(_bpe_of(model))
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)]
    )
    _save(
        tokenizer,
        directory,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        add_bos_token=True,
        add_eos_token=False,
        add_prefix_space=True,
        added_tokens_decoder={
            str(i): {"content": token.content, "special": True, "normalized": False}
            for i, token in enumerate(special)
        },
    )
    if not keep_model:
        model.unlink()


def _bpe_of(model: Path) -> models.BPE:
    """What transformers makes of a SentencePiece BPE: all splits of a piece are merges of it."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(model))
    vocabulary = {pieces.IdToPiece(i): i for i in range(pieces.GetPieceSize())}
    merges = [
        (-pieces.GetScore(token), at, (text[:at], text[at:]))
        for text, token in vocabulary.items()
        for at in range(1, len(text))
        if text[:at] in vocabulary and text[at:] in vocabulary
    ]
    ordered = [merge for _, _, merge in sorted(merges)]
    return models.BPE(vocabulary, ordered, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


@functools.cache
def _sentencepiece_model() -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = [line for text in pydoc_data.topics.topics.values() for line in text.splitlines()]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=SENTENCEPIECE_VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _from_gguf(vocabulary: Path, *, ignore_merges: bool) -> Tokenizer:
    fields = GGUFReader(vocabulary).fields

    def value(name: str) -> Any:
        return fields[f"tokenizer.ggml.{name}"].contents()

    tokens, types = value("tokens"), value("token_type")
    used = {t: i for i, t in enumerate(tokens) if types[i] == TokenType.NORMAL}
    merges = [tuple(merge.split(" ")) for merge in value("merges")]
    tokenizer = Tokenizer(models.BPE(vocab=used, merges=merges, ignore_merges=ignore_merges))
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def _save(tokenizer: Tokenizer, directory: Path, **settings: Any) -> int:
    tokenizer.save(str(directory / "tokenizer.json"))
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()
