"""A checkpoint's tokenizer in GGUF's terms: tokens, scores, types, merges, pre-tokenizer.

Two kinds: byte-level BPE (llama.cpp's ``gpt2``) and SentencePiece BPE (``llama``). What the files
are decides, not the architecture: Mistral and Phi come with either. Where there is a
tokenizer.json, it decides, and a tokenizer.model beside it only gives the scores of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.data.calibration import bos_id, eos_id
from quantkit.errors import ConversionError
from quantkit.formats.gguf.vocabulary import (
    SPACE,
    Token,
    TokenType,
    added,
    unused,
    within,
)
from quantkit.models.checkpoint import Checkpoint
from quantkit.producers.gguf import pretokenizers, sentencepiece
from quantkit.producers.gguf.special_tokens import SpecialTokens, read_special_tokens
from quantkit.system.json_file import load_json

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedTokenizerBase

_LIKE_LLAMA = frozenset(
    {
        *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "GraniteForCausalLM"),
        *("SmolLM3ForCausalLM", "Ministral3ForCausalLM", "Ernie4_5ForCausalLM"),
    }
)
"""Where llama.cpp's converter reads ``add_prefix_space``, and knows two models by their size."""
_NEVER_BOS_VOCABULARY = 49152
"""SmolLM's and Granite's."""
_CODE_LLAMA_VOCABULARY, _CODE_LLAMA_EOT = 32016, 32010

_NO_SPACE_PREFIX = frozenset({"Gemma2ForCausalLM", "Gemma3ForCausalLM"})

_GLM = {
    "eos": "<|endoftext|>",
    "eot": "<|user|>",
    "unk": "<|endoftext|>",
    "bos": "<|endoftext|>",
}
"""What llama.cpp's converter calls GLM-4's tokens, whatever the files say."""

_BEGINS_WITH_BOS = frozenset(
    {
        *("llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        *("tekken", "chameleon"),
    }
)
"""Pre-tokenizers for which llama.cpp adds BOS unless the file says that it must not."""


@dataclass(frozen=True)
class Tokenizer:
    """``model``: ``gpt2`` or ``llama``. ``merges`` is empty for the second, whose tokens have
    scores. ``space_prefix``: whether a space is put before a text; None: the model's default."""

    model: str
    pre: str
    tokens: list[Token]
    merges: list[str]
    special: SpecialTokens
    space_prefix: bool | None = None

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add all ``tokenizer.*`` keys."""
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([token.text for token in self.tokens])
        if self.model == "llama":
            writer.add_token_scores([token.score for token in self.tokens])
        writer.add_token_types([token.type for token in self.tokens])
        if self.merges:
            writer.add_token_merges(self.merges)
        self.special.write(writer)


def read_tokenizer(checkpoint: Checkpoint, vocabulary: int) -> Tokenizer:
    """``vocabulary``: the rows of the embedding, to which the tokens are padded.

    Raise CheckpointError for damaged files, ConversionError for a tokenizer that llama.cpp lacks.
    """
    description = load_json(checkpoint.path / "tokenizer.json")
    model = description.get("model", {})
    if model.get("type") == "BPE" and _is_byte_level(description):
        tokenizer = _of_bytes(checkpoint, description, vocabulary)
    elif sentencepiece.is_model(checkpoint.path / "tokenizer.model") or (
        model.get("type") == "BPE" and model.get("byte_fallback")
    ):
        tokenizer = _of_pieces(checkpoint, description, vocabulary)
    elif model.get("type") == "BPE":
        tokenizer = _of_bytes(checkpoint, description, vocabulary)
    else:
        kind = model.get("type", "no tokenizer.json")
        raise ConversionError(
            f"gguf: {checkpoint.path}: unsupported tokenizer ({kind}); expected tokenizer.json "
            "with a BPE model, or SentencePiece's tokenizer.model"
        )
    if checkpoint.architecture in _NO_SPACE_PREFIX:
        tokenizer = replace(tokenizer, space_prefix=False)
    elif checkpoint.architecture == "Glm4ForCausalLM":
        known = {token.text.decode(errors="replace"): i for i, token in enumerate(tokenizer.tokens)}
        tokenizer.special.ids |= {r: known[text] for r, text in _GLM.items() if text in known}
    elif checkpoint.architecture in _LIKE_LLAMA:
        tokenizer = _like_llama(tokenizer, checkpoint)
    return _as_it_reads(tokenizer, checkpoint, of_file=bool(description))


def _is_byte_level(description: dict[str, Any]) -> bool:
    splitter = description.get("pre_tokenizer") or {}
    return any(
        step.get("type") == "ByteLevel" for step in splitter.get("pretokenizers", [splitter])
    )


def _as_it_reads(tokenizer: Tokenizer, checkpoint: Checkpoint, *, of_file: bool) -> Tokenizer:
    """With what is measured of a text, where the file's keys would have llama.cpp do another
    thing: they are taken from settings, as its converter takes them. ``of_file``: there is a
    tokenizer.json; without it transformers only decides what is put around a text."""
    reader, special = checkpoint.tokenizer, tokenizer.special
    pieces = tokenizer.model == "llama"
    bos, eos = bos_id(reader), eos_id(reader)
    default = pieces or tokenizer.pre in _BEGINS_WITH_BOS
    if special.added.get("bos", default) != (bos is not None):
        special.added["bos"] = bos is not None
    if special.added.get("eos", False) != (eos is not None):
        special.added["eos"] = eos is not None
    # What llama.cpp puts before a text is its BOS, whatever the settings call by that name.
    special.ids |= {r: i for r, i in (("bos", bos), ("eos", eos)) if i is not None}
    if not pieces or not of_file:
        return tokenizer
    first = reader("a", add_special_tokens=False).input_ids[:1]
    prefix = "".join(reader.convert_ids_to_tokens(first)).startswith(SPACE)
    if (tokenizer.space_prefix is not False) == prefix:
        return tokenizer
    return replace(tokenizer, space_prefix=prefix)


def _like_llama(tokenizer: Tokenizer, checkpoint: Checkpoint) -> Tokenizer:
    if len(tokenizer.tokens) == _NEVER_BOS_VOCABULARY:
        tokenizer.special.added["bos"] = False
    elif len(tokenizer.tokens) == _CODE_LLAMA_VOCABULARY:
        tokenizer.special.ids["eot"] = _CODE_LLAMA_EOT
    settings = load_json(checkpoint.path / "tokenizer_config.json")
    flag = settings.get("add_prefix_space")
    return tokenizer if flag is None else replace(tokenizer, space_prefix=flag)


def _of_pieces(checkpoint: Checkpoint, description: dict[str, Any], vocabulary: int) -> Tokenizer:
    special = read_special_tokens(checkpoint.path, description, checkpoint.config, vocabulary)
    if not sentencepiece.is_of(checkpoint.path / "tokenizer.model", description):
        tokens = sentencepiece.from_json(description, vocabulary, checkpoint.path)
    elif checkpoint.architecture == "Phi3ForCausalLM":
        tokens = sentencepiece.from_model_of_phi_3(checkpoint.path, vocabulary)
    else:
        tokens = sentencepiece.from_model(checkpoint.path, vocabulary)
    if description:
        tokens = sentencepiece.unmarked(tokens, description)
    return Tokenizer("llama", "default", tokens, [], special)


def _of_bytes(checkpoint: Checkpoint, description: dict[str, Any], vocabulary: int) -> Tokenizer:
    tokenizer = checkpoint.tokenizer
    pre = pretokenizers.detect(tokenizer, description, checkpoint.path)
    special = read_special_tokens(checkpoint.path, description, checkpoint.config, None)
    merges = [_merge(merge) for merge in description["model"]["merges"]]
    return Tokenizer(
        "gpt2", pre, _byte_level(tokenizer, vocabulary, checkpoint.path), merges, special
    )


def _byte_level(tokenizer: PreTrainedTokenizerBase, vocabulary: int, where: Path) -> list[Token]:
    """Tokens in GPT-2's byte alphabet; added ones as plain text."""
    extra = tokenizer.added_tokens_decoder
    tokens = unused(vocabulary, score=0.0)
    for text, token in within(tokenizer.get_vocab().items(), vocabulary, where):
        if token not in extra:
            tokens[token] = Token(text.encode(), 0.0, TokenType.NORMAL)
            continue
        if not extra[token].normalized:
            # llama.cpp matches added tokens in raw text: store what they look like there.
            ids = tokenizer.encode(text, add_special_tokens=False)
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        tokens[token] = added(text, extra[token].special, score=0.0)
    return tokens


def _merge(merge: str | list[str]) -> str:
    """``left right``; a space inside a part becomes ``Ġ``, as it is in the byte alphabet."""
    return merge if isinstance(merge, str) else " ".join(p.replace(" ", "Ġ") for p in merge)
