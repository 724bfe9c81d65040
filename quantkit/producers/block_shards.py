"""The tensors of single blocks in the shards of a quantized checkpoint: write them, read them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.decoder.blocks import DecoderBlocks
from quantkit.formats.integer_linears import Floats, Integers, LinearLayout
from quantkit.formats.shards import Shards
from quantkit.models.spec import GroupScheme
from quantkit.system.stopwatch import stage


@dataclass(frozen=True)
class BlockShards:
    """Where the blocks of a checkpoint go; ``layouts``: of each linear that is quantized, by its
    name in the checkpoint."""

    blocks: DecoderBlocks
    layouts: Mapping[str, LinearLayout]
    shards: Shards

    def linears(self, index: int) -> dict[str, GroupScheme]:
        """The linears of a block that are quantized, by their names in the block."""
        return {name: layout.scheme for name, (_, layout) in self._packed(index).items()}

    def write(
        self, index: int, module: nn.Module, integers: Mapping[str, Integers | Floats]
    ) -> None:
        """Put a block into its place: integers packed, all else as the module has it."""
        for name, (stored, layout) in self._packed(index).items():
            with stage("pack"):
                tensors = layout.pack(integers[name])
            with stage("write"):
                for part, tensor in tensors.items():
                    self.shards.write(f"{stored}.{part}", tensor)
        for stored, tensor in self._unquantized(index, module):
            dtype = self.blocks.checkpoint.tensors[stored].torch_dtype
            self.shards.write(stored, tensor.to(dtype).contiguous())

    def restore(self, index: int, module: nn.Module) -> None:
        """Give the block the weights that engines will compute with, from what is written."""
        with stage("pack"):
            for name, (stored, layout) in self._packed(index).items():
                parts = [self.shards.read(f"{stored}.{part}") for part in layout.parts]
                weight = module.get_parameter(f"{name}.weight")
                on_device = [part.to(self.blocks.device) for part in parts]
                weight.data = layout.unpack(*on_device).to(weight.dtype)
            for stored, tensor in self._unquantized(index, module):
                tensor.copy_(self.shards.read(stored))

    def digest(self, index: int) -> str:
        """The hash of all that is written of a block."""
        digest = hashlib.sha256()
        for stored in self.blocks.stored(index).values():
            linear = stored.removesuffix(".weight")
            parts = self.layouts[linear].parts if linear in self.layouts else ()
            for name in [f"{linear}.{part}" for part in parts] or [stored]:
                raw = self.shards.read(name).flatten().view(torch.uint8)
                digest.update(raw.numpy().data)
        return digest.hexdigest()

    def _packed(self, index: int) -> dict[str, tuple[str, LinearLayout]]:
        """The names in the files and the layouts of a block's quantized linears, by their names in
        the block."""
        return {
            name: (stored, self.layouts[stored])
            for name, stored in self.blocks.linears(index).items()
            if stored in self.layouts
        }

    def _unquantized(self, index: int, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Norms, biases, routers and what is skipped, by their names in the files and as there."""
        packed = self._packed(index)
        names = self.blocks.stored(index)
        turned = self.blocks.turned(index)
        for name, tensor in module.state_dict().items():
            if name.removesuffix(".weight") not in packed:
                yield names[name], tensor.T if names[name] in turned else tensor
