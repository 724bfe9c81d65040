"""Bit layouts against slow loops and words written by hand."""

from __future__ import annotations

import pytest
import torch

from quantkit.formats.packing import (
    AWQ_ORDER,
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_rows,
)


def _codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.int32)


def _word(values: list[int], bits: int) -> int:
    """Python integers, lowest bits first, as a signed 32-bit word."""
    word = sum(value << (bits * slot) for slot, value in enumerate(values))
    return word - (1 << 32) if word >= 1 << 31 else word


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_qweight_packs_along_the_input_lowest_bits_first(bits: int) -> None:
    codes = _codes(64, 16, bits)
    packed = pack_rows(codes, bits)
    slots = 32 // bits
    assert packed.shape == (64 // slots, 16)
    assert packed.dtype == torch.int32
    for word in range(packed.shape[0]):
        for column in range(16):
            values = codes[word * slots : (word + 1) * slots, column].tolist()
            assert packed[word, column].item() == _word(values, bits)
    assert torch.equal(unpack_rows(packed, bits), codes)


@pytest.mark.parametrize("order", [None, AWQ_ORDER])
def test_columns_pack_in_the_given_order(order: tuple[int, ...] | None) -> None:
    codes = _codes(6, 32, 4)
    packed = pack_columns(codes, 4, order)
    for row in range(6):
        for word in range(4):
            eight = codes[row, word * 8 : word * 8 + 8].tolist()
            values = [eight[i] for i in order] if order else eight
            assert packed[row, word].item() == _word(values, 4)
    assert torch.equal(unpack_columns(packed, 4, order), codes)


def test_awq_word_by_hand() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    # Columns 0 2 4 6 1 3 5 7 from the lowest nibble up.
    assert pack_columns(codes, 4, AWQ_ORDER).item() == 0x75316420


def test_a_full_word_is_minus_one() -> None:
    assert pack_columns(torch.full((1, 8), 15), 4).item() == -1
