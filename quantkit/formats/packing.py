"""Bit layouts: integers into int32 words, eight 4-bit (or four 8-bit) values a word.

Layouts as AutoGPTQ and AutoAWQ write them and vLLM's kernels read them.
"""

from __future__ import annotations

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Slot k of a word of the AWQ GEMM layout holds column AWQ_ORDER[k] of its eight."""


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, columns) integers in [0, 2**bits) → (rows * bits / 32, columns) int32.

    Row r is in word r // (32 / bits), lowest bits first: GPTQ's ``qweight``.
    """
    return pack_columns(codes.T.contiguous(), bits).T.contiguous()


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of pack_rows, as int32."""
    return unpack_columns(words.T.contiguous(), bits).T.contiguous()


def pack_columns(
    codes: torch.Tensor, bits: int, order: tuple[int, ...] | None = None
) -> torch.Tensor:
    """(rows, columns) integers in [0, 2**bits) → (rows, columns * bits / 32) int32.

    Slot k of a word, lowest bits first, holds its column ``order[k]``, or k without an order:
    GPTQ's ``qzeros`` without, AWQ's ``qweight`` and ``qzeros`` with AWQ_ORDER.
    """
    slots = 32 // bits
    grouped = codes.long().view(codes.shape[0], -1, slots)
    if order is not None:
        grouped = grouped[:, :, list(order)]
    words = torch.zeros_like(grouped[:, :, 0])
    for slot in range(slots):
        words |= grouped[:, :, slot] << (bits * slot)
    # A word's highest bit is the sign of an int32.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack_columns(
    words: torch.Tensor, bits: int, order: tuple[int, ...] | None = None
) -> torch.Tensor:
    """The inverse of pack_columns, as int32.

    Bits that do not divide 32 are read as others' files have them: 32 integers in ``bits`` words,
    one after another, some of them partly in the next word.
    """
    if 32 % bits:
        return _unpack_across_words(words, bits)
    slots = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int64, device=words.device)
    grouped = (words.long().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    if order is not None:
        back = sorted(range(slots), key=lambda slot: order[slot])
        grouped = grouped[:, :, back]
    return grouped.reshape(words.shape[0], -1).int()


def _unpack_across_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    rows = words.shape[0]
    # A row's last words may be fewer than a whole group's, and one is read past the end.
    padded = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, -words.shape[1] % bits))
    grouped = torch.nn.functional.pad(padded.view(rows, -1, bits), (0, 1))
    starts = torch.arange(32, device=words.device) * bits
    word, shift = starts // 32, starts % 32
    found = (grouped[:, :, word] >> shift) | (grouped[:, :, word + 1] << (32 - shift))
    return (found & ((1 << bits) - 1)).view(rows, -1).int()
