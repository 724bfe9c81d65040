"""From llama.cpp's tensors back to the checkpoint's: the inverses of ``transforms``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from quantkit.formats.gguf.architectures import transforms
from quantkit.formats.gguf.architectures.architecture import Config, Transform

if TYPE_CHECKING:
    import torch


def invertible(transforms_: Sequence[Transform | None]) -> bool:
    """Whether a tensor can be recovered from those that these transforms made of it."""
    if len(transforms_) == 1:
        return transforms_[0] is None or transforms_[0] in _INVERSES
    return set(transforms_) == _LATENT


def restore(stored: Sequence[tuple[Transform | None, torch.Tensor]], c: Config) -> torch.Tensor:
    """The checkpoint's tensor, recovered from ``stored``: llama.cpp's tensors, each with the
    transform that made it.

    Exact, but for the rounding of ``plus_one``. Only for what is ``invertible``.
    """
    if len(stored) > 1:
        made = dict(stored)
        return _join_latent(made[transforms.latent_keys], made[transforms.latent_values])
    ((transform, values),) = stored
    return values if transform is None else _INVERSES[transform](values, c)


def separate(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head from pairs to halves: undoes ``transforms.interleave``."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _separate_queries(rows: torch.Tensor, c: Config) -> torch.Tensor:
    return separate(rows, c["num_attention_heads"])


def _separate_keys(rows: torch.Tensor, c: Config) -> torch.Tensor:
    return separate(rows, c["num_key_value_heads"])


def _minus_one(weight: torch.Tensor, _: Config) -> torch.Tensor:
    return weight.float() - 1


def _group_heads(rows: torch.Tensor, c: Config) -> torch.Tensor:
    apart = rows.reshape(3, c["num_attention_heads"], -1, *rows.shape[1:])
    return apart.swapaxes(0, 1).reshape(rows.shape)


def _join_latent(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(heads, rank, nope) and (heads, v, rank) to (heads * (nope + v), rank)."""
    import torch

    return torch.cat([keys.swapaxes(1, 2), values], 1).flatten(0, 1)


_INVERSES: dict[Transform, Callable[[torch.Tensor, Config], torch.Tensor]] = {
    transforms.interleave_queries: _separate_queries,
    transforms.interleave_keys: _separate_keys,
    transforms.plus_one: _minus_one,
    transforms.transpose: transforms.transpose,
    transforms.ungroup_heads: _group_heads,
}
_LATENT: set[Transform | None] = {transforms.latent_keys, transforms.latent_values}
