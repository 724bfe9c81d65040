"""Metadata of a GGUF as the bytes that stand in the file."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
from gguf import GGUFValueType as ValueType

_VALUES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}

Metadata = Mapping[str, bytes]
"""Type and value as stored, by key, in the order of the file."""


def packed_fields(writer: gguf.GGUFWriter) -> dict[str, bytes]:
    """All keys that ``writer`` was given, in its order."""
    return {
        key: packed(field.value, field.type, field.sub_type)
        for key, field in writer.kv_data[0].items()
    }


def packed(value: Any, kind: ValueType, item: ValueType | None = None) -> bytes:
    """A value's type and the value, as a GGUF stores them; ``item`` is the type of an array's."""
    if kind != ValueType.ARRAY:
        return struct.pack("<I", kind) + _packed([value], kind)
    if item is None:
        item = ValueType.UINT8 if isinstance(value, bytes) else ValueType.get_type(value[0])
    return struct.pack("<IIQ", kind, item, len(value)) + _packed(value, item)


def _packed(values: Sequence[Any], kind: ValueType) -> bytes:
    if kind == ValueType.STRING:
        return b"".join(map(string, values))
    return struct.pack(f"<{len(values)}{_VALUES[kind]}", *values)


def string(text: str | bytes) -> bytes:
    """Its length and its bytes."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data
