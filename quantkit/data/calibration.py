"""Calibration: the token windows that quantizers look at while they decide."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction
from typing import TYPE_CHECKING

from quantkit.data.mix import Mix, Part, allot, interleave
from quantkit.data.text import Conversation, Text
from quantkit.errors import RecipeError, first_line
from quantkit.models.chat_template import DEFAULT, render
from quantkit.models.variant import CalibrationRecord, KindRecord
from quantkit.system import devices
from quantkit.system.files import sha256_json
from quantkit.system.progress import say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_DAY = datetime(2026, 1, 1)
"""The date that templates are given, so that calibration has the same tokens tomorrow."""
_HELD_OUT = 2
"""Windows of each kind, at most, that quantizers do not see but are judged on."""
_SHORTEST = 64
"""Tokens of one of these."""
_CHARACTERS = 16
"""Characters: more than a token has in any ordinary text."""


@dataclass(frozen=True)
class Calibration:
    """Token windows, where they came from, and how they are to be run through the model.

    ``ids``: (samples, sequence_length) int64, on the CPU. ``precision``: as for ``DecoderBlocks``.
    """

    ids: torch.Tensor
    record: CalibrationRecord
    device: torch.device
    precision: torch.dtype
    held_out: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Windows by kind of text, (n, T) int64, that quantizers are judged on and never see."""


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
    text: Text | Mix,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    device: str = "cpu",
    precision: devices.Precision = "auto",
    judges: Mix | None = None,
) -> Calibration:
    """Cut the text into windows that do not overlap and take ``samples`` of them, seeded.

    Of a mix each kind gives windows of its own, by its share, and they take turns. Where the model
    begins texts with BOS, each window does, in place of its first token: the model is calibrated as
    it is measured, and as llama.cpp's ``llama-imatrix`` does it. Windows that are left over, and
    some of each other kind in ``judges``, are held out.

    Raise RecipeError where the text has fewer windows than that, or the device is not there.
    """
    import torch

    mix = text if isinstance(text, Mix) else Mix(text.dataset, (Part("", Fraction(1), text),))
    template = _chat_template(mix, tokenizer)
    streams = [_as_served(part.text, tokenizer, template) for part in mix.parts]
    windows = [_windows(ids, sequence_length) for ids in streams]
    available = [len(found) for found in windows]
    if sum(available) < samples:
        raise RecipeError(
            f"calibration text {mix.name!r} has {sum(available)} windows of {sequence_length} "
            f"tokens, {samples} were asked for; use a longer text, or fewer or shorter samples"
        )
    left = [found - min(_HELD_OUT, found // 8) for found in available]
    if sum(left) >= samples:
        available = left
    counts = allot([part.share for part in mix.parts], available, samples)
    if isinstance(text, Mix):
        _say_what_is_short(mix, available, counts, samples)
    drawn = [_drawn(found, seed) for found in windows]
    taken = list(map(iter, drawn))
    chosen = torch.stack([next(taken[kind]) for kind in interleave(counts)])
    held_out = {
        part.kind or part.text.dataset: found[count : count + _HELD_OUT]
        for part, found, count in zip(mix.parts, drawn, counts, strict=True)
    }
    for part in judges.parts if judges else ():
        if part.text not in mix.texts and part.kind not in held_out:
            held_out[part.kind] = _first_windows(part.text, tokenizer, sequence_length)
    held_out = _affordable(held_out, samples * sequence_length)
    bos = bos_id(tokenizer)
    if bos is not None:
        for some in (chosen, *held_out.values()):
            some[:, 0] = bos
    place = devices.choose(device)
    return Calibration(
        chosen,
        CalibrationRecord(
            dataset=mix.name,
            revision=None if isinstance(text, Mix) else text.revision,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            sha256=hash_ids(chosen.flatten().tolist()),
            template=sha256_json(template) if template else None,
            kinds=_kinds(mix, counts) if isinstance(text, Mix) else [],
        ),
        place,
        devices.precision(precision, place),
        held_out,
    )


def _affordable(held_out: Mapping[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """As much of each kind as makes an eighth of the ``tokens`` to calibrate on, since all of it
    runs through three models: whole windows, or the beginning of one."""
    some = {kind: windows for kind, windows in held_out.items() if len(windows)}
    each = tokens // (8 * max(1, len(some)))
    return {
        kind: windows[: max(1, each // windows.shape[1]), : max(_SHORTEST, each)].contiguous()
        for kind, windows in some.items()
    }


def _first_windows(text: Text, tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """The windows to hold out, (n, length), from the beginning of a text."""
    characters = _HELD_OUT * length * _CHARACTERS
    return _windows(stream(tokenizer, text.text[:characters])[0], length)[:_HELD_OUT]


def _as_served(text: Text, tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[int]:
    """The text as one token stream; conversations one after another in the model's template."""
    if not text.conversations or template is None:
        return stream(tokenizer, text.text)[0]
    # A template writes its BOS itself.
    return tokenize(
        tokenizer, "".join(rendered(c, template, tokenizer) for c in text.conversations)
    )


def _windows(ids: Sequence[int], length: int) -> torch.Tensor:
    """All windows, (N, length) int64, without what is left at the end."""
    import torch

    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)


def _drawn(windows: torch.Tensor, seed: int) -> torch.Tensor:
    """The same windows in an order that the seed decides, whatever else is in a mix."""
    import torch

    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def rendered(chat: Conversation, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the served model reads it, whatever day it is."""
    names = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    return render(template, chat, strftime_now=_DAY.strftime, **names)


def _chat_template(mix: Mix, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template for the mix's conversations; None where there are none, the model has none, or
    it refuses them."""
    chats = [chat for text in mix.texts for chat in text.conversations]
    found = tokenizer.chat_template
    template: str | None = found.get(DEFAULT) if isinstance(found, dict) else found
    if not chats or not template:
        return None
    try:
        for chat in chats:
            rendered(chat, template, tokenizer)
    except Exception as error:  # whatever a template's expressions raise
        why = first_line(error)
        say(f"calibration: conversations are plain text; the chat template refuses them: {why}")
        return None
    return template


def _say_what_is_short(
    mix: Mix, available: Sequence[int], counts: Sequence[int], samples: int
) -> None:
    for part, has, given in zip(mix.parts, available, counts, strict=True):
        if given == has and given < int(part.share * samples):
            say(
                f"calibration: {part.kind} has {has} windows, fewer than its share of {samples}; "
                "the other kinds give more"
            )


def _kinds(mix: Mix, counts: Sequence[int]) -> list[KindRecord]:
    return [
        KindRecord(
            kind=part.kind,
            dataset=part.text.dataset,
            revision=part.text.revision,
            share=float(part.share),
            samples=count,
        )
        for part, count in zip(mix.parts, counts, strict=True)
    ]
