"""Texts of different kinds, cut so that nothing is scored that was calibrated on.

Of every text the first three quarters are for calibrating, the last quarter is for scoring.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FILES = {
    "c4": "calibration/c4.utf8",
    "wiki": "calibration/wiki.utf8",
    "code": "calibration/code.utf8",
    "technical": "calibration/technical.utf8",
    "mixed": "calibration/groups_merged.txt",
    "wikitext": "wikitext-2-raw/wiki.test.raw",
}
"""By kind, where a text lies in the data directory. ``mixed``: papers, chat, many languages."""


def calibration(
    data: Path, tokenizer: Any, kinds: list[str], samples: int, length: int, seed: int
) -> torch.Tensor:
    """Windows of the kinds in turn, drawn without repetition: (samples, length) int64."""
    drawn = {}
    for number, kind in enumerate(kinds):
        count = len(range(number, samples, len(kinds)))
        pool = _windows(_part(data, kind, scored=False), tokenizer, length)
        if len(pool) < count:
            raise SystemExit(f"{kind}: {len(pool)} windows of {length}, {count} were asked for")
        generator = torch.Generator().manual_seed(seed)
        drawn[kind] = iter(pool[torch.randperm(len(pool), generator=generator)[:count]])
    return torch.stack([next(drawn[kinds[i % len(kinds)]]) for i in range(samples)])


def scored(data: Path, tokenizer: Any, kind: str, count: int, length: int) -> torch.Tensor:
    """Windows at even distances: (count, length) int64."""
    pool = _windows(_part(data, kind, scored=True), tokenizer, length)
    if len(pool) < count:
        raise SystemExit(f"{kind}: {len(pool)} windows of {length} to score, {count} asked for")
    return pool[torch.arange(count) * len(pool) // count]


def _part(data: Path, kind: str, *, scored: bool) -> str:
    text = (data / FILES[kind]).read_text(encoding="utf-8")
    cut = len(text) * 3 // 4
    return text[cut:] if scored else text[:cut]


def _windows(text: str, tokenizer: Any, length: int) -> torch.Tensor:
    """The text as windows that do not overlap; each begins as the model's texts do."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    begun = tokenizer("a").input_ids
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    windows = ids[: len(ids) // length * length].view(-1, length).clone()
    if begun[: len(plain)] != plain:
        windows[:, 0] = begun[0]
    return windows
