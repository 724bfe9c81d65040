"""The tensors of single blocks in the shards of a quantized checkpoint: write them, read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.blocks import DecoderBlocks
from quantkit.formats.integer_linears import LinearLayout
from quantkit.formats.shards import Shards
from quantkit.quantize.rounding import Integers
from quantkit.spec import GroupScheme
from quantkit.stopwatch import stage


@dataclass(frozen=True)
class BlockShards:
    """Where the blocks of a checkpoint go; ``layouts``: of each linear that is quantized, by its
    name in the checkpoint."""

    blocks: DecoderBlocks
    layouts: Mapping[str, LinearLayout]
    shards: Shards

    def linears(self, index: int) -> dict[str, GroupScheme]:
        """The linears of a block that are quantized, by their names in the block."""
        return {name: layout.scheme for name, layout in self._layouts(index).items()}

    def write(self, index: int, module: nn.Module, integers: Mapping[str, Integers]) -> None:
        """Put a block into its place: integers packed, all else as the module has it."""
        prefix = self.blocks.prefix(index)
        for name, layout in self._layouts(index).items():
            with stage("pack"):
                tensors = layout.pack(integers[name])
            with stage("write"):
                for part, tensor in tensors.items():
                    self.shards.write(f"{prefix}{name}.{part}", tensor)
        for name, tensor in self._unquantized(index, module):
            stored = self.blocks.checkpoint.tensors[prefix + name].torch_dtype
            self.shards.write(prefix + name, tensor.to(stored))

    def restore(self, index: int, module: nn.Module) -> None:
        """Give the block the weights that engines will compute with, from what is written."""
        prefix = self.blocks.prefix(index)
        with stage("pack"):
            for name, layout in self._layouts(index).items():
                parts = [self.shards.read(f"{prefix}{name}.{part}") for part in layout.parts]
                weight = module.get_parameter(f"{name}.weight")
                on_device = [part.to(self.blocks.device) for part in parts]
                weight.data = layout.unpack(*on_device).to(weight.dtype)
            for name, tensor in self._unquantized(index, module):
                tensor.copy_(self.shards.read(prefix + name))

    def digest(self, index: int) -> str:
        """The hash of all that is written of a block."""
        digest, layouts = hashlib.sha256(), self._layouts(index)
        prefix = self.blocks.prefix(index)
        for name in self.blocks.state_names:
            linear = name.removesuffix(".weight")
            parts = layouts[linear].parts if linear in layouts else ()
            for stored in [f"{linear}.{part}" for part in parts] or [name]:
                raw = self.shards.read(prefix + stored).flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
        return digest.hexdigest()

    def _layouts(self, index: int) -> dict[str, LinearLayout]:
        prefix = self.blocks.prefix(index)
        names = {name: f"{prefix}{name}" for name in self.blocks.linears}
        return {name: self.layouts[full] for name, full in names.items() if full in self.layouts}

    def _unquantized(self, index: int, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Norms, biases and what is skipped, by their names in the block."""
        layouts = self._layouts(index)
        for name, tensor in module.state_dict().items():
            if name.removesuffix(".weight") not in layouts:
                yield name, tensor
