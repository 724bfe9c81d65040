"""Calibration: the token windows that quantizers look at while they decide."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit import devices
from quantkit.errors import RecipeError
from quantkit.texts import Text
from quantkit.variant import CalibrationRecord

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Calibration:
    """Token windows, where they came from, and how they are to be run through the model.

    ``ids``: (samples, sequence_length) int64, on the CPU. ``precision``: as for ``DecoderBlocks``.
    """

    ids: torch.Tensor
    record: CalibrationRecord
    device: torch.device
    precision: torch.dtype


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text as one token stream, nothing added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that every text begins with, or None: the one answer for all that is measured,
    calibrated on, asked and written into a GGUF.

    Asked of the tokenizer's behaviour: a ``bos_token`` is often only declared (SmolLM2, Qwen2),
    and ``add_bos_token`` says nothing beside a post-processor (Llama 3).
    """
    ids, plain = (tokenizer("a", add_special_tokens=add).input_ids for add in (True, False))
    return None if ids[: len(plain)] == plain else int(ids[0])


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that every text ends with, or None."""
    ids, plain = (tokenizer("a", add_special_tokens=add).input_ids for add in (True, False))
    return None if ids[len(ids) - len(plain) :] == plain else int(ids[-1])


def stream(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int | None]:
    """The text as one token stream that begins as every text does, and with which BOS."""
    bos = bos_id(tokenizer)
    return [*([] if bos is None else [bos]), *tokenize(tokenizer, text)], bos


def hash_ids(ids: Sequence[int]) -> str:
    """sha256 of token ids as little-endian int32."""
    import numpy as np

    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()


def calibrate(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    device: str = "cpu",
    precision: devices.Precision = "auto",
) -> Calibration:
    """Cut the text into windows that do not overlap and take ``samples`` of them, seeded.

    Where the model begins texts with BOS, each window does, in place of its first token: the model
    is calibrated as it is measured, and as llama.cpp's ``llama-imatrix`` does it.

    Raise RecipeError where the text has fewer windows than that, or the device is not there.
    """
    import torch

    tokens, bos = stream(tokenizer, text.text)
    ids = torch.tensor(tokens)
    windows = ids[: len(ids) // sequence_length * sequence_length].view(-1, sequence_length)
    if len(windows) < samples:
        raise RecipeError(
            f"calibration text {text.dataset!r} has {len(windows)} windows of {sequence_length} "
            f"tokens, {samples} were asked for; use a longer text, or fewer or shorter samples"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    chosen = windows[order[:samples]].contiguous()
    if bos is not None:
        chosen[:, 0] = bos
    place = devices.choose(device)
    return Calibration(
        chosen,
        CalibrationRecord(
            dataset=text.dataset,
            revision=text.revision,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            sha256=hash_ids(chosen.flatten().tolist()),
        ),
        place,
        devices.precision(precision, place),
    )
