"""A checkpoint's tokenizer in GGUF's terms: tokens, scores, types, merges, pre-tokenizer.

Two kinds: byte-level BPE (llama.cpp's ``gpt2``: Llama 3, SmolLM2, Qwen2) from tokenizer.json, and
SentencePiece BPE (``llama``: Llama 2, Mistral) from tokenizer.model or, without it, tokenizer.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.errors import ConversionError
from quantkit.formats.gguf import pretokenizers, sentencepiece
from quantkit.formats.gguf.sentencepiece import SPACE, PieceType
from quantkit.formats.gguf.special_tokens import SpecialTokens, load_json, read_special_tokens

if TYPE_CHECKING:
    import gguf

_ADDED_SCORE = -1000.0
_UNUSED_SCORE = -10000.0
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_BEGINS_WITH_BOS = ("llama-bpe", "falcon3", "midm-2.0")
"""Pre-tokenizers for which llama.cpp adds BOS unless the file says that it must not."""

_NEVER_BOS_VOCABULARY = 49152
"""SmolLM's and Granite's: llama.cpp's converter knows by its size that no BOS is added."""

_CODE_LLAMA_VOCABULARY, _CODE_LLAMA_EOT = 32016, 32010


@dataclass(frozen=True)
class Tokenizer:
    """``model``: ``gpt2`` or ``llama``. ``scores`` is empty for the first, ``merges`` for the
    second. ``space_prefix``: whether a space is put before a text; None: the model's default."""

    model: str
    pre: str
    tokens: list[bytes]
    scores: list[float]
    types: list[int]
    merges: list[str]
    special: SpecialTokens
    space_prefix: bool | None

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add all ``tokenizer.*`` keys."""
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        self.special.write(writer)


def read_tokenizer(checkpoint: Checkpoint, vocabulary: int) -> Tokenizer:
    """``vocabulary``: the rows of the embedding, to which the tokens are padded.

    Raise CheckpointError for damaged files, ConversionError for a tokenizer that llama.cpp lacks.
    """
    description = load_json(checkpoint.path / "tokenizer.json")
    special = read_special_tokens(checkpoint.path, description, checkpoint.config, vocabulary)
    settings = load_json(checkpoint.path / "tokenizer_config.json")
    merges: list[str] = []
    if sentencepiece.is_model(checkpoint.path / "tokenizer.model"):
        model, pre, entries = "llama", "default", _from_pieces(checkpoint, settings, vocabulary)
    elif _is_sentencepiece(description):
        model, pre, entries = "llama", "default", _from_json(checkpoint, description, vocabulary)
    elif description.get("model", {}).get("type") == "BPE":
        _check_normalizer(checkpoint, description)
        pre = pretokenizers.detect(checkpoint.tokenizer, description, checkpoint.path)
        model, entries = "gpt2", _byte_level(checkpoint, vocabulary)
        merges = [_merge(merge) for merge in description["model"]["merges"]]
    else:
        kind = description.get("model", {}).get("type", "no tokenizer.json")
        raise ConversionError(
            f"gguf: {checkpoint.path}: unsupported tokenizer ({kind}); expected tokenizer.json "
            "with a BPE model, or SentencePiece's tokenizer.model"
        )
    if vocabulary == _NEVER_BOS_VOCABULARY:
        special.added["bos"] = False
    elif vocabulary == _CODE_LLAMA_VOCABULARY:
        special.ids["eot"] = _CODE_LLAMA_EOT
    elif pre in _BEGINS_WITH_BOS and "bos" not in special.added:
        special.added["bos"] = checkpoint.tokenizer("a").input_ids[0] == special.ids.get("bos")
    # llama.cpp's converter reads this setting for the Llama family only.
    of_llama = checkpoint.architecture != "Qwen2ForCausalLM"
    return Tokenizer(
        model,
        pre,
        [entry.text for entry in entries],
        [entry.score for entry in entries] if model == "llama" else [],
        [entry.type for entry in entries],
        merges,
        special,
        settings.get("add_prefix_space") if of_llama else None,
    )


def _byte_level(checkpoint: Checkpoint, vocabulary: int) -> list[sentencepiece.Piece]:
    """Tokens in GPT-2's byte alphabet; added ones as plain text."""
    tokenizer = checkpoint.tokenizer
    added = tokenizer.added_tokens_decoder
    entries = _unused(vocabulary, score=0.0)
    for text, token in _within(tokenizer.get_vocab().items(), vocabulary, checkpoint):
        if token not in added:
            entries[token] = sentencepiece.Piece(text.encode(), 0.0, PieceType.NORMAL)
            continue
        if not added[token].normalized:
            # llama.cpp matches added tokens in raw text: store what they look like there.
            text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        entries[token] = _added(text, added[token].special, score=0.0)
    return entries


def _from_pieces(
    checkpoint: Checkpoint, settings: dict[str, Any], vocabulary: int
) -> list[sentencepiece.Piece]:
    """The pieces of tokenizer.model, then what other files add to them or rename."""
    entries = _unused(vocabulary, score=_UNUSED_SCORE)
    pieces = sentencepiece.read_pieces(checkpoint.path / "tokenizer.model")
    for token, piece in enumerate(pieces[:vocabulary]):
        # llama.cpp marks as user-defined only what the files below add.
        user = piece.type == PieceType.USER_DEFINED
        kind = PieceType.NORMAL if user else piece.type
        entries[token] = sentencepiece.Piece(piece.text, piece.score, kind)
    for text, token in load_json(checkpoint.path / "added_tokens.json").items():
        if token < vocabulary:
            entries[token] = sentencepiece.Piece(
                text.encode(), _ADDED_SCORE, PieceType.USER_DEFINED
            )
    for key, token in settings.get("added_tokens_decoder", {}).items():
        if int(key) < vocabulary:
            entries[int(key)] = _added(token["content"], token.get("special"), _ADDED_SCORE)
    return entries


def _from_json(
    checkpoint: Checkpoint, description: dict[str, Any], vocabulary: int
) -> list[sentencepiece.Piece]:
    """A SentencePiece vocabulary of which only tokenizer.json is left.

    The scores are gone, but their order is that of the merges, and nothing else about them
    matters to BPE. (llama.cpp's converter gives every token the same score; it then merges from
    the left, and its tokens differ from the model's.)
    """
    rank: dict[str, int] = {}
    for index, merge in enumerate(description["model"]["merges"]):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), index)
    entries = _unused(vocabulary, score=_UNUSED_SCORE)
    items = description["model"]["vocab"].items()
    for text, token in _within(items, vocabulary, checkpoint):
        kind = PieceType.BYTE if _BYTE.fullmatch(text) else PieceType.NORMAL
        score = -float(rank.get(text, len(rank)))
        entries[token] = sentencepiece.Piece(text.encode(), score, kind)
    added = {token["content"]: token["id"] for token in description["added_tokens"]}
    special = {token["content"] for token in description["added_tokens"] if token["special"]}
    for text, token in _within(added.items(), vocabulary, checkpoint):
        entries[token] = _added(text, text in special, _ADDED_SCORE)
    return entries


def _added(text: str, special: bool | None, score: float) -> sentencepiece.Piece:
    """A token added to the vocabulary: control, or text that is always one token."""
    if special or _looks_special(text):
        return sentencepiece.Piece(text.encode(), score, PieceType.CONTROL)
    plain = text.replace(SPACE, " ")
    return sentencepiece.Piece(plain.encode(), score, PieceType.USER_DEFINED)


def _looks_special(text: str) -> bool:
    """Some models do not mark their control tokens as such."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))  # noqa: RUF001  DeepSeek's
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _unused(vocabulary: int, score: float) -> list[sentencepiece.Piece]:
    """Embeddings that no token uses keep a name of their own."""
    return [
        sentencepiece.Piece(f"[PAD{token}]".encode(), score, PieceType.UNUSED)
        for token in range(vocabulary)
    ]


def _within(
    items: Iterable[tuple[str, int]], vocabulary: int, checkpoint: Checkpoint
) -> Iterable[tuple[str, int]]:
    for text, token in items:
        if token >= vocabulary:
            raise ConversionError(
                f"gguf: {checkpoint.path}: token {text!r} has id {token}, but the embedding has "
                f"{vocabulary} rows (config.json: vocab_size)"
            )
        yield text, token


def _merge(merge: str | list[str]) -> str:
    """``left right``; a space inside a part becomes ``Ġ``, as it is in the byte alphabet."""
    return merge if isinstance(merge, str) else " ".join(p.replace(" ", "Ġ") for p in merge)


def _is_sentencepiece(description: dict[str, Any]) -> bool:
    model = description.get("model", {})
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def _check_normalizer(checkpoint: Checkpoint, description: dict[str, Any]) -> None:
    kind = (description.get("normalizer") or {}).get("type", "NFC")
    if kind != "NFC":  # which changes only text that is not in normal form
        raise ConversionError(
            f"gguf: {checkpoint.path}: llama.cpp cannot normalize text as tokenizer.json asks "
            f"({kind})"
        )
