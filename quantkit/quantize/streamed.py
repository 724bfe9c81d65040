"""What a quantizer is given of a model: one block, and the calibration windows that reach it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.decoder.activations import Activations
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.expert_names import expert_of, is_routed
from quantkit.decoder.structure import Fold, Structure
from quantkit.models.spec import GroupScheme


@dataclass(frozen=True)
class StreamedBlock:
    """One block on the device, still in float."""

    blocks: DecoderBlocks
    index: int
    module: nn.Module
    linears: Mapping[str, GroupScheme]
    """Those to quantize, by their names in the block."""
    inputs: Activations
    """What the blocks before give it, quantized as they are by now."""
    source: Activations
    """What they give it in the source (``advance_source``)."""

    @property
    def name(self) -> str:
        """The block's name in the checkpoint: ``model.layers.3``."""
        return self.blocks.prefix(self.index).removesuffix(".")

    @property
    def structure(self) -> Structure:
        """What the block is made of, found and proved."""
        return self.blocks.structure(self.index)

    @property
    def folds(self) -> list[Fold]:
        """The mappings that can take scales: those whose balance layers are all quantized."""
        linears = self.linears.keys()
        return [fold for fold in self.structure.folds if linears >= set(fold.balance_layers)]

    def advance_source(self, source_block: nn.Module) -> Activations:
        """Let ``source_block``, the float block, turn ``source`` into its outputs there: what this
        block should give, and the next one's source. A quantizer does this once."""
        self.blocks.advance(self.index, source_block, self.source)
        return self.source

    def run(self) -> None:
        """Send all calibration windows through it, for hooks to watch."""
        for batch in self.inputs:
            self.run_batch(batch, self.module)

    def run_batch(self, batch: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """What ``module``, this block or a copy of it, gives for one batch of activations."""
        return self.blocks.run(self.index, module, batch)


def unseen_note(block: StreamedBlock, unseen: Collection[str]) -> Iterator[str]:
    """What the manifest says of experts, by their names in the block, that saw no token."""
    if unseen:
        experts = {expert_of(name) for name in block.linears if is_routed(name)}
        numbers = ", ".join(map(str, sorted(int(name.rpartition(".")[2]) for name in unseen)))
        yield (
            f"{block.name}: {len(unseen)} of {len(experts)} experts saw no token and are rounded "
            f"to nearest ({numbers}); more calibration text reaches more of them"
        )


def linear_weight(module: nn.Module, linear: str) -> torch.Tensor:
    """The weight of a linear of a block: (out, in), as it is now."""
    return module.get_parameter(f"{linear}.weight").data
