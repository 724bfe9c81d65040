"""The tensors of a GGUF: which there are, from which of the checkpoint's, and their values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from quantkit.errors import ConversionError
from quantkit.formats.gguf.architectures.architecture import (
    Architecture,
    Config,
    Module,
    Transform,
)
from quantkit.formats.gguf.architectures.rope import rope_tensors
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.text_part import is_part

if TYPE_CHECKING:
    import torch

_FLOAT32 = (
    *(".bias", "_norm.weight", ".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight"),
    *("position_embd.weight", ".ssm_conv1d.weight", ".shortconv.conv.weight"),
)
"""Ends of the names of what llama.cpp computes with in float32 only, beside all vectors."""

_LANGUAGE = "language_model."
"""In names of tensors, where a checkpoint has other parts too."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the GGUF; ``shape`` in torch's order.

    ``sources``: the checkpoint's tensors that it is made from, one or, ``stacked``, several of
    one shape; none where it holds ``values``. ``transform``: what is done to the source.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...] = ()
    stacked: bool = False
    transform: Transform | None = None
    values: tuple[float, ...] = ()

    @property
    def float32(self) -> bool:
        """Whether it is float32 in a file of any type, as in those of llama.cpp's converter."""
        return len(self.shape) == 1 or self.name.endswith(_FLOAT32)


def layout(checkpoint: Checkpoint, architecture: Architecture, c: Config) -> list[Tensor]:
    """See ``architectures.layout``. The order is that of the shards and of the names in a shard;
    a stack comes with the last of its parts."""
    stored_as = _names(checkpoint)
    c = c | {"stacked": any(name.endswith(".experts.down_proj") for name in stored_as)}
    expected: dict[str, tuple[int, ...]] = {}
    groups: dict[str, list[Tensor]] = {}
    group_of: dict[str, str] = {}
    for prefix, gguf_prefix, module in _modules(stored_as, architecture, c):
        for kind, stored, shape in _parts(module, c):
            source = f"{prefix}{module.source}{kind}"
            if c.get(module.optional) and source not in stored_as:
                continue
            stacked = "*" in source
            parts = [source.replace("*", str(i)) for i in range(shape[0] if stacked else 1)]
            names = [stored_as.get(part, part) for part in parts]
            expected |= dict.fromkeys(names, stored[1:] if stacked else stored)
            # What stands before the star: all stacks of a block's experts are written together.
            group = source.partition("*")[0]
            group_of |= dict.fromkeys(names, group)
            groups.setdefault(group, []).append(
                Tensor(
                    f"{gguf_prefix}{module.name}{kind}",
                    shape,
                    tuple(names),
                    stacked,
                    module.transform,
                )
            )
    checkpoint.check_shapes(expected)
    awaited = Counter(group_of.values())
    tensors = [Tensor(name, (len(v),), values=tuple(v)) for name, v in rope_tensors(c).items()]
    wanted = [checkpoint.tensors[name] for name in stored_as.values()]
    for info in sorted(wanted, key=lambda info: (info.shard, info.name)):
        if info.name in group_of:
            group = group_of[info.name]
            awaited[group] -= 1
            tensors += [] if awaited[group] else groups[group]
        elif not any(fnmatchcase(info.name, pattern) for pattern in architecture.ignored):
            raise ConversionError(
                f"gguf: {info.shard}: {info.name} is not a tensor of {checkpoint.architecture} "
                "as config.json describes it"
            )
    return tensors


def read(checkpoint: Checkpoint, tensor: Tensor, c: Config) -> torch.Tensor:
    """See ``architectures.read_tensor``."""
    import torch

    if tensor.values:
        return torch.tensor(tensor.values, dtype=torch.float32)
    if tensor.stacked:
        dtypes = {checkpoint.tensors[source].torch_dtype for source in tensor.sources}
        common = dtypes.pop() if len(dtypes) == 1 else torch.float32
        weights = torch.empty(tensor.shape, dtype=common)
        for part, source in zip(weights, tensor.sources, strict=True):
            part.copy_(checkpoint.read(source))
    else:
        weights = checkpoint.read(tensor.sources[0])
    if weights.dtype == torch.float64:
        weights = weights.float()  # rounded twice on its way to 16 bits, as by the converter
    return (tensor.transform(weights, c) if tensor.transform else weights).contiguous()


def _names(checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's names of the language model's tensors, by what they would be without other
    parts beside it."""
    if not is_part(checkpoint):
        return {name: name for name in checkpoint.tensors}
    return {
        name.replace(_LANGUAGE, "", 1): name
        for name in checkpoint.tensors
        if _LANGUAGE in name or name.startswith("lm_head.")
    }


def _modules(
    names: Collection[str], architecture: Architecture, c: Config
) -> Iterator[tuple[str, str, Module]]:
    """Every module that the config asks for, with the prefixes of its name in the checkpoint and
    in the GGUF."""
    base = architecture.blocks.partition(".")[0] + "."
    # Checkpoints that were saved without their head lack the prefix: OpenAI's GPT-2.
    dropped = "" if any(name.startswith(base) for name in names) else base
    for module in architecture.outer:
        if _holds(module.when, c):
            yield "", "", replace(module, source=module.source.removeprefix(dropped))
    for block in range(c["num_hidden_layers"]):
        here = c | {
            "sparse": block >= c.get("first_k_dense_replace", 0),
            "recurrent": any(c["recurrent_layers"][block : block + 1]),
        }
        for module in architecture.block:
            if _holds(module.when, here):
                prefix = architecture.blocks.removeprefix(dropped)
                yield f"{prefix}{block}.", f"blk.{block}.", module


def _holds(when: str, c: Config) -> bool:
    return not when or bool(c.get(when.removeprefix("!"))) != when.startswith("!")


def _parts(module: Module, c: Config) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Its weight and, where it has one, its bias: their shapes in the checkpoint and after."""
    import torch

    stored = tuple(_size(product, c) for product in module.shape.split())
    shape = stored
    if module.transform:
        shape = tuple(module.transform(torch.empty(stored, device="meta"), c).shape)
    yield "" if module.alone else ".weight", stored, shape
    if c.get(module.bias) if isinstance(module.bias, str) else module.bias:
        yield ".bias", shape[:1], shape[:1]


def _size(product: str, c: Config) -> int:
    return math.prod(int(f) if f.isdigit() else int(c[f]) for f in product.split("*"))
