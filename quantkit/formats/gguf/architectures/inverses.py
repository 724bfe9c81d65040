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
    return set(transforms_) in (_LATENT, _HALVES, _PAIRS)


def restore(stored: Sequence[tuple[Transform | None, torch.Tensor]], c: Config) -> torch.Tensor:
    """The checkpoint's tensor, recovered from ``stored``: llama.cpp's tensors, each with the
    transform that made it.

    Exact, but for the rounding of ``plus_one`` and ``tiled_decay``. Only for what is
    ``invertible``.
    """
    if len(stored) > 1:
        made = dict(stored)
        if set(made) == _HALVES:
            return _join_halves(made[transforms.first_half], made[transforms.second_half])
        if set(made) == _PAIRS:
            return _join_pairs(made[transforms.first_of_pairs], made[transforms.second_of_pairs], c)
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


def _join_halves(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([first, second], 1)


def _join_pairs(first: torch.Tensor, second: torch.Tensor, c: Config) -> torch.Tensor:
    import torch

    return torch.stack([transforms.turned(part, c) for part in (first, second)], -1).flatten(-2)


def _kernel(weight: torch.Tensor, _: Config) -> torch.Tensor:
    return weight.unsqueeze(1)


def _group(rows: torch.Tensor, c: Config) -> torch.Tensor:
    groups = c["linear_num_key_heads"]
    tiled = rows.reshape(c["linear_num_value_heads"] // groups, groups, -1, *rows.shape[1:])
    return tiled.swapaxes(0, 1).reshape(rows.shape)


def _group_columns(weight: torch.Tensor, c: Config) -> torch.Tensor:
    return _group(weight.T, c).T


def _group_after_keys(rows: torch.Tensor, c: Config) -> torch.Tensor:
    import torch

    values = len(rows) - c["linear_v"]
    return torch.cat([rows[:values], _group(rows[values:], c)])


def _grouped_kernel(weight: torch.Tensor, c: Config) -> torch.Tensor:
    return _kernel(_group_after_keys(weight, c), c)


def _logarithm(decay: torch.Tensor, c: Config) -> torch.Tensor:
    return (-_group(decay.float(), c)).log()


_INVERSES: dict[Transform, Callable[[torch.Tensor, Config], torch.Tensor]] = {
    transforms.interleave_queries: _separate_queries,
    transforms.interleave_keys: _separate_keys,
    transforms.plus_one: _minus_one,
    transforms.transpose: transforms.transpose,
    transforms.ungroup_heads: _group_heads,
    transforms.turned: transforms.turned,
    transforms.kernel: _kernel,
    transforms.tile: _group,
    transforms.tile_columns: _group_columns,
    transforms.tile_after_keys: _group_after_keys,
    transforms.tiled_kernel: _grouped_kernel,
    transforms.tiled_decay: _logarithm,
}
_LATENT: set[Transform | None] = {transforms.latent_keys, transforms.latent_values}
_HALVES: set[Transform | None] = {transforms.first_half, transforms.second_half}
_PAIRS: set[Transform | None] = {transforms.first_of_pairs, transforms.second_of_pairs}
