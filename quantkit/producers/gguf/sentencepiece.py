"""SentencePiece vocabularies: tokenizer.model, and what is left of it in a tokenizer.json.

``tokenizer.model`` is a protobuf (sentencepiece_model.proto); three of its fields matter here;
reading them takes fewer lines than a dependency, and runs no code of the checkpoint.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.gguf.vocabulary import (
    ADDED_SCORE,
    SPACE,
    Token,
    TokenType,
    added,
    unused,
    within,
)
from quantkit.system.json_file import load_json

_UNUSED_SCORE = -10000.0
_BPE = 2  # TrainerSpec.ModelType
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def is_model(path: Path) -> bool:
    """Whether the file begins as a SentencePiece model does: Llama 3's tiktoken file of the same
    name does not."""
    return path.is_file() and path.read_bytes()[:1] == b"\x0a"


def is_of(path: Path, description: dict[str, Any]) -> bool:
    """Whether ``path`` is a SentencePiece model with the tokens of a tokenizer.json, but for added
    ones; then it knows their scores. True as well where there is no tokenizer.json."""
    if not is_model(path) or not description:
        return is_model(path)
    extra = {token["id"] for token in description.get("added_tokens", [])}
    pieces = {at: piece.text.decode(errors="replace") for at, piece in enumerate(read_pieces(path))}
    known = {token: text for text, token in description["model"]["vocab"].items()}
    return all(pieces.get(at) == known.get(at) for at in (pieces.keys() | known.keys()) - extra)


def from_model(directory: Path, vocabulary: int) -> list[Token]:
    """The pieces of tokenizer.model, then what added_tokens.json, tokenizer_config.json and
    tokenizer.json add to them or rename. The last, where there is one, has the last word."""
    tokens = _from_pieces(directory, vocabulary)
    settings = load_json(directory / "tokenizer_config.json").get("added_tokens_decoder", {})
    description = load_json(directory / "tokenizer.json")
    written = {token["id"]: token["content"] for token in description.get("added_tokens", [])}
    for token, entry in ((int(key), entry) for key, entry in settings.items()):
        if token < vocabulary and (not description or written.get(token) == entry["content"]):
            _add(tokens, token, added(entry["content"], entry.get("special"), ADDED_SCORE))
    for entry in description.get("added_tokens", []):
        wanted = added(entry["content"], entry["special"], ADDED_SCORE)
        if entry["id"] < vocabulary:
            there = tokens[entry["id"]]
            kinds = (there.type, wanted.type)
            unknown = kinds == (TokenType.UNKNOWN, TokenType.CONTROL)
            if there.text != wanted.text or not (unknown or kinds[0] == kinds[1]):
                _add(tokens, entry["id"], wanted)
    return tokens


def unmarked(tokens: list[Token], description: dict[str, Any]) -> list[Token]:
    """As text what tokenizer.model marks and tokenizer.json does not add: it reads it as text."""
    added_ids = {token["id"] for token in description.get("added_tokens", [])}
    marked = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
    return [
        token._replace(type=TokenType.NORMAL)
        if token.type in marked and at not in added_ids
        else token
        for at, token in enumerate(tokens)
    ]


def _add(tokens: list[Token], token: int, wanted: Token) -> None:
    """Put an added token in its place. One of several spaces stays the piece that it is: as text
    of its own it would be cut out of longer runs of spaces before they are merged.
    (llama.cpp's converter does so, and reads 32 spaces as Gemma does not.)"""
    only_spaces = not wanted.text.strip(b" ")
    if not (only_spaces and tokens[token].text.decode(errors="replace").strip(SPACE) == ""):
        tokens[token] = wanted


def from_model_of_phi_3(directory: Path, vocabulary: int) -> list[Token]:
    """The same where only what is marked as special is a control token, and tokenizer.json adds
    tokens too."""
    tokens = _from_pieces(directory, vocabulary)
    settings = load_json(directory / "tokenizer_config.json")
    by_id = [(int(key), token) for key, token in settings.get("added_tokens_decoder", {}).items()]
    description = load_json(directory / "tokenizer.json")
    by_id += [(token["id"], token) for token in description.get("added_tokens", [])]
    for key, token in by_id:
        if key < vocabulary:
            kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
            tokens[key] = Token(token["content"].encode(), ADDED_SCORE, kind)
    return tokens


def from_json(description: dict[str, Any], vocabulary: int, where: Path) -> list[Token]:
    """A vocabulary that only tokenizer.json still has.

    The scores are gone, but their order is that of the merges, and nothing else about them
    matters to BPE. (llama.cpp's converter gives every token the same score; it then merges from
    the left, and its tokens differ from the model's.)
    """
    rank: dict[str, int] = {}
    for index, merge in enumerate(description["model"]["merges"]):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), index)
    tokens = unused(vocabulary, _UNUSED_SCORE)
    for text, token in within(description["model"]["vocab"].items(), vocabulary, where):
        kind = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        tokens[token] = Token(text.encode(), -float(rank.get(text, len(rank))), kind)
    extra = {token["content"]: token for token in description["added_tokens"]}
    for text, token in within(((t, e["id"]) for t, e in extra.items()), vocabulary, where):
        _add(tokens, token, added(text, extra[text]["special"], ADDED_SCORE))
    return tokens


def _from_pieces(directory: Path, vocabulary: int) -> list[Token]:
    tokens = unused(vocabulary, _UNUSED_SCORE)
    for token, piece in enumerate(read_pieces(directory / "tokenizer.model")[:vocabulary]):
        # llama.cpp marks as user-defined only what the other files add.
        user = piece.type == TokenType.USER_DEFINED
        kind = TokenType.NORMAL if user else piece.type
        tokens[token] = Token(piece.text, piece.score, kind)
    for text, token in load_json(directory / "added_tokens.json").items():
        if token < vocabulary:
            tokens[token] = Token(text.encode(), ADDED_SCORE, TokenType.USER_DEFINED)
    return tokens


def read_pieces(path: Path) -> list[Token]:
    """The vocabulary of a ``tokenizer.model``.

    Raise CheckpointError for a damaged file, ConversionError for one that is not BPE.
    """
    pieces = []
    kind = 1  # the proto's default: unigram
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                kind = int(dict(_fields(value)).get(3, kind))
    except (IndexError, struct.error, ValueError) as error:
        raise CheckpointError(f"{path}: damaged SentencePiece model: {error}") from error
    if kind != _BPE:
        raise ConversionError(
            f"gguf: {path}: a SentencePiece model that is not BPE, which llama.cpp would tokenize "
            "differently"
        )
    return pieces


def _piece(message: bytes) -> Token:
    fields = dict(_fields(message))
    text, score, kind = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, TokenType.NORMAL)
    assert isinstance(text, bytes)
    return Token(text, float(score), TokenType(int(kind)))


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    """The fields of a protobuf message: number and value (32-bit values as float)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            integer, at = _varint(message, at)
            yield number, integer
        elif wire == 2:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError(f"a field of {length} bytes at {at} ends beyond the message")
            yield number, message[at : at + length]
            at += length
        elif wire in (1, 5):
            size, layout = (8, "<d") if wire == 1 else (4, "<f")
            yield number, float(struct.unpack_from(layout, message, at)[0])
            at += size
        else:
            raise ValueError(f"wire type {wire} at byte {at}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
