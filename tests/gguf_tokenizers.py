"""Tokenizers of the families that the GGUF converter knows, to put into tiny checkpoints.

The real ones, rebuilt from the vocabularies in llama.cpp's tree (models/ggml-vocab-*.gguf). That
they are the real ones is seen from the converter, which knows each by the hash of a probe's ids.
"""

from __future__ import annotations

import functools
import io
import json
import pydoc_data.topics
import re
import struct
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
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

from quantkit.formats.gguf.header import read_header
from quantkit.producers.gguf.tokenizer import Tokenizer as GGUFTokenizer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
SENTENCEPIECE_VOCABULARY = 1000
_UNUSED = re.compile(r"\[PAD\d+\]|<unused\d+>")


def split(*rules: str) -> PreTokenizer:
    """Regexes one after the other, then the byte alphabet."""
    steps = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])


GPT_2 = pre_tokenizers.ByteLevel(False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT_2])
LLAMA_3 = split(CONTRACTIONS + r"\p{N}{1,3}" + REST)
QWEN_2 = split(CONTRACTIONS + r"\p{N}" + REST)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = split(_CASED % ("", "", r"\p{N}"))
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_4O = split(_CASED % (_SUFFIX, _SUFFIX, r"\p{N}{1,3}"))
_LETTERS = (  # DeepSeek's: of the alphabets that have capitals
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ"  # noqa: RUF001
    "-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"  # noqa: RUF001
)
DEEPSEEK_LLM = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(rule), "isolated")
        for rule in (
            r"[\r\n]",
            rf"\s?[{_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",  # noqa: RUF001
            r"\s+$",
            "[一-龥ࠀ-一가-\ud7ff]+",
        )
    ]
    + [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=False)]
)


def write_byte_level(
    vocabulary: Path,
    directory: Path,
    rules: PreTokenizer,
    *,
    cut: int | None = None,
    extra: tuple[str, ...] = (),
    plain: tuple[str, ...] = (),
    ignore_merges: bool = False,
    normalizer: Any = None,
    begin: str | None = None,
    **settings: Any,
) -> int:
    """A byte-level tokenizer from a ggml-vocab-*.gguf; returns its size.

    ``cut``: only the first so many tokens, to which ``extra`` control tokens and ``plain`` ones
    are added. ``begin``: put before every text.
    """
    tokenizer = _from_gguf(vocabulary, cut, ignore_merges=ignore_merges)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in extra])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in plain])
    tokenizer.pre_tokenizer = rules
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    bytes_again = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = bytes_again
    if begin is not None:
        template = _template(begin, tokenizer.token_to_id(begin))
        tokenizer.post_processor = processors.Sequence([bytes_again, template])
    return _save(tokenizer, directory, **settings)


def write_sentencepiece(directory: Path, *, keep_model: bool = True) -> None:
    """A Llama 2 tokenizer trained on Python's manual: tokenizer.json, and tokenizer.model too."""
    write_pieces(_trained_model(), directory, like_llama=True, keep_model=keep_model)


def write_pieces(
    model: bytes,
    directory: Path,
    *,
    like_llama: bool,
    bos: str = "<s>",
    eos: str = "</s>",
    control: tuple[str, ...] = (),
    plain: tuple[str, ...] = (),
    keep_model: bool = True,
    **settings: Any,
) -> int:
    """tokenizer.json and tokenizer.model of a SentencePiece model; returns the size.

    ``like_llama``: a space is put before a text. ``control`` and ``plain`` are tokens of the
    model or beyond it that tokenizer_config.json and tokenizer.json add.
    """
    file = directory / "tokenizer.model"
    file.write_bytes(model)
    tokenizer = Tokenizer(_bpe_of(file))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in dict.fromkeys(("<unk>", bos, eos, *control))]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in plain])
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if like_llama:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = _template(bos, tokenizer.token_to_id(bos))
    settings = {"add_bos_token": True, "add_eos_token": False, **settings}
    size = _save(tokenizer, directory, bos_token=bos, eos_token=eos, unk_token="<unk>", **settings)
    if not keep_model:
        file.unlink()
    return size


def pieces_of(vocabulary: Path, rename: dict[str, str] | None = None, *, like_llama: bool) -> bytes:
    """The tokenizer.model from which a ggml-vocab-*.gguf of a SentencePiece model was made."""
    metadata = read_header(vocabulary).metadata
    tokens, types, scores = (
        metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores")
    )
    pieces = []
    for token, (text, kind, score) in enumerate(zip(tokens, types, scores, strict=True)):
        if _UNUSED.fullmatch(text) and kind != TokenType.NORMAL:
            break
        if text == "<unk>":
            kind, score = TokenType.UNKNOWN, 0.0
        elif text in ("<s>", "</s>", "<pad>", "<bos>", "<eos>") and kind != TokenType.NORMAL:
            kind, score = TokenType.CONTROL, 0.0
        elif kind != TokenType.BYTE:
            kind = TokenType.NORMAL
            score = score if score > -1000.0 else -float(token) - 0.5  # none shares it
        pieces.append(_piece((rename or {}).get(text, text).encode(), score, kind))
    trainer = b"\x18\x02" + b"\x98\x02\x01"  # model_type BPE, byte_fallback
    # The prefix, then remove_extra_whitespaces, which is on unless it is put off.
    normalizer = _message(1, b"identity") + b"\x18%c\x20\x00" % like_llama
    return b"".join(pieces) + _message(2, trainer) + _message(3, normalizer)


def write_vocabulary(tokenizer: GGUFTokenizer, path: Path) -> Path:
    """A GGUF of nothing but the tokenizer, which llama.cpp loads as ``vocab_only``."""
    writer = gguf.GGUFWriter(path, "llama")
    tokenizer.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _piece(text: bytes, score: float, kind: int) -> bytes:
    return _message(1, _message(1, text) + b"\x15" + struct.pack("<f", score) + b"\x18%c" % kind)


def _message(number: int, content: bytes) -> bytes:
    size, length = b"", len(content)
    while length > 0x7F:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def _template(token: str, id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(f"{token} $A", f"{token} $A {token}:1 $B:1", [(token, id)])


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
def _trained_model() -> bytes:
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


def _from_gguf(vocabulary: Path, cut: int | None, *, ignore_merges: bool) -> Tokenizer:
    metadata = read_header(vocabulary).metadata
    tokens, types, merges = (
        metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges")
    )
    entries = list(enumerate(zip(tokens, types, strict=True)))[:cut]
    entries = [(i, (t, kind)) for i, (t, kind) in entries if not _UNUSED.fullmatch(t)]
    ids = {text: token for token, (text, _) in entries}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if cut is not None:
        pairs = [pair for pair in pairs if {*pair, "".join(pair)} <= ids.keys()]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs, ignore_merges=ignore_merges))
    tokenizer.decoder = decoders.ByteLevel()
    control = [text for _, (text, kind) in entries if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    plain = [text for _, (text, kind) in entries if kind == TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=True) for text in plain])
    return tokenizer


def _save(tokenizer: Tokenizer, directory: Path, **settings: Any) -> int:
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {
            str(token): {"content": t.content, "special": t.special, "normalized": t.normalized}
            for token, t in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        **settings,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()
