"""SentencePiece vocabularies: ``tokenizer.model``, read without the sentencepiece package.

The file is a protobuf (sentencepiece_model.proto), of which three fields matter here; reading
them takes fewer lines than a dependency, and runs no code of the checkpoint.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from quantkit.errors import CheckpointError, ConversionError

SPACE = "\u2581"
"""How SentencePiece writes a space."""


class PieceType(IntEnum):
    """The types of a piece; SentencePiece and ``tokenizer.ggml.token_type`` number them alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: bytes
    score: float
    type: PieceType


_BPE = 2  # TrainerSpec.ModelType


def is_model(path: Path) -> bool:
    """Whether the file begins as a SentencePiece model does: Llama 3's tiktoken file of the same
    name does not."""
    return path.is_file() and path.read_bytes()[:1] == b"\x0a"


def read_pieces(path: Path) -> list[Piece]:
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


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    text, score, kind = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, PieceType.NORMAL)
    assert isinstance(text, bytes)
    return Piece(text, float(score), PieceType(int(kind)))


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
                raise ValueError(f"a field of {length} bytes at {at} ends behind the message")
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
