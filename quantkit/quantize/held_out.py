"""Text that no quantizer decides by: how far blocks and the whole model are from the source on it.

Error compensation learns from calibration text, and what it gains there it may lose on text of
another kind. Rounding to nearest learns nothing, so it goes along on the same text: what is no
better than that has not generalized. Falling back to rounding for single blocks that were farther
from the source was tried, and made models worse on that text too (tests/benchmarks/RESULTS.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quantkit.decoder.blocks import DecoderBlocks
from quantkit.formats.integer_linears import Floats, Integers
from quantkit.quantize.deviation import Deviation, deviation


@dataclass(frozen=True)
class Loss:
    """Mean KL divergence from the source over all tokens, nats: of the model as quantized, and of
    one that is rounded to nearest on the same grid."""

    kld: float
    rounding_kld: float


class HeldOut:
    """Windows by kind, (n, T) each, on their way through the blocks; there may be none."""

    def __init__(self, blocks: DecoderBlocks, windows: Mapping[str, torch.Tensor]) -> None:
        self._blocks = blocks
        self._kinds: dict[str, slice] = {}
        for kind, ids in windows.items():
            start = sum(map(len, (windows[one] for one in self._kinds)))
            self._kinds[kind] = slice(start, start + len(ids))
        if windows:
            self._ids = torch.cat(list(windows.values()))
            self._source = blocks.embed(self._ids)
            self._quantized, self._rounded = self._source.copy(), self._source.copy()

    def __len__(self) -> int:
        return len(self._kinds)

    def advance(
        self,
        index: int,
        source_block: nn.Module,
        rounding: Mapping[str, Integers | Floats],
        quantized: nn.Module,
    ) -> dict[str, Deviation]:
        """Send all through block ``index``: the deviation of ``quantized``, by kind.

        ``source_block`` has the source's weights, and those of ``rounding`` afterwards.
        """
        blocks = self._blocks
        given = torch.cat(list(self._quantized))
        exact = torch.cat([blocks.run(index, source_block, batch) for batch in self._quantized])
        blocks.advance(index, source_block, self._source)
        blocks.advance(index, quantized, self._quantized)
        give(source_block, rounding)
        blocks.advance(index, source_block, self._rounded)
        found = torch.cat(list(self._quantized))
        return {
            kind: deviation(found[windows], exact[windows], given[windows])
            for kind, windows in self._kinds.items()
        }

    def losses(self) -> dict[str, Loss]:
        """The losses by kind of text, after the last block."""
        logits = self._blocks.head()
        klds = torch.empty(len(self._ids), 2)
        for window in range(len(self._ids)):
            one = torch.tensor([window])
            source, quantized, rounded = (
                logits(self._ids[one], stream.pick(one).cpu()).log_softmax(-1)
                for stream in (self._source, self._quantized, self._rounded)
            )
            for column, other in enumerate((quantized, rounded)):
                klds[window, column] = (source.exp() * (source - other)).sum(-1).mean()
        means = {kind: klds[windows].mean(0).tolist() for kind, windows in self._kinds.items()}
        return {kind: Loss(quantized, rounded) for kind, (quantized, rounded) in means.items()}


def give(module: nn.Module, integers: Mapping[str, Integers | Floats]) -> None:
    """Let linears of a block, by name, compute with their integers."""
    for name, one in integers.items():
        weight = module.get_parameter(f"{name}.weight")
        weight.data = one.dequantize().to(weight.dtype)
