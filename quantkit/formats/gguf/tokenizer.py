"""A checkpoint's tokenizer in GGUF's terms: tokens, scores, types, merges, pre-tokenizer.

Two kinds: byte-level BPE (llama.cpp's ``gpt2``) from tokenizer.json, and SentencePiece BPE
(``llama``) from tokenizer.model or, without it, tokenizer.json. What the files are decides, not
the architecture: Mistral and Phi come with either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.gguf import pretokenizers, sentencepiece
from quantkit.formats.gguf.special_tokens import SpecialTokens, read_special_tokens
from quantkit.formats.gguf.vocabulary import Token, TokenType, added, unused, within
from quantkit.json_file import load_json

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedTokenizerBase

_LIKE_LLAMA = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "GraniteForCausalLM"}
)
"""Where llama.cpp's converter reads ``add_prefix_space``, and knows two models by their size."""
_NEVER_BOS_VOCABULARY = 49152
"""SmolLM's and Granite's."""
_CODE_LLAMA_VOCABULARY, _CODE_LLAMA_EOT = 32016, 32010

_NO_SPACE_PREFIX = frozenset({"Gemma2ForCausalLM", "Gemma3ForCausalLM"})

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
    if sentencepiece.is_model(checkpoint.path / "tokenizer.model") or (
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
        return replace(tokenizer, space_prefix=False)
    if checkpoint.architecture in _LIKE_LLAMA:
        return _like_llama(tokenizer, checkpoint)
    return tokenizer


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
    prefix = None
    if not sentencepiece.is_model(checkpoint.path / "tokenizer.model"):
        tokens = sentencepiece.from_json(description, vocabulary, checkpoint.path)
        prefix = None if sentencepiece.prepends_space(description) else False
    elif checkpoint.architecture == "Phi3ForCausalLM":
        tokens = sentencepiece.from_model_of_phi_3(checkpoint.path, vocabulary)
    else:
        tokens = sentencepiece.from_model(checkpoint.path, vocabulary)
    return Tokenizer("llama", "default", tokens, [], special, prefix)


def _of_bytes(checkpoint: Checkpoint, description: dict[str, Any], vocabulary: int) -> Tokenizer:
    _check_normalizer(description.get("normalizer"), checkpoint.path)
    tokenizer = _as_written(checkpoint.path)
    pre = pretokenizers.detect(tokenizer, description, checkpoint.path)
    special = read_special_tokens(checkpoint.path, description, checkpoint.config, None)
    if pre in _BEGINS_WITH_BOS and "bos" not in special.added:
        begins = tokenizer("a").input_ids[0] == special.ids.get("bos")
        if not begins:  # of which llama.cpp's converter leaves llama.cpp ignorant
            special.added["bos"] = False
    merges = [_merge(merge) for merge in description["model"]["merges"]]
    return Tokenizer(
        "gpt2", pre, _byte_level(tokenizer, vocabulary, checkpoint.path), merges, special
    )


def _as_written(directory: Path) -> PreTrainedTokenizerBase:
    """tokenizer.json as it is. The class that tokenizer_config.json names is not asked: those of
    transformers 5 put their own rules in place of the file's, and some checkpoints name a wrong
    one (DeepSeek's a Llama's)."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            directory, local_files_only=True
        )
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{directory}: unreadable tokenizer: {reason}") from error
    return tokenizer


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
            text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
        tokens[token] = added(text, extra[token].special, score=0.0)
    return tokens


def _merge(merge: str | list[str]) -> str:
    """``left right``; a space inside a part becomes ``Ġ``, as it is in the byte alphabet."""
    return merge if isinstance(merge, str) else " ".join(p.replace(" ", "Ġ") for p in merge)


def _check_normalizer(normalizer: dict[str, Any] | None, where: Path) -> None:
    for step in (normalizer or {}).get("normalizers", [normalizer or {}]):
        if step.get("type", "NFC") != "NFC":  # which changes only text that is not in normal form
            raise ConversionError(
                f"gguf: {where}: llama.cpp cannot normalize text as tokenizer.json asks "
                f"({step['type']})"
            )
