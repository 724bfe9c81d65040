"""Compute an importance matrix: the unquantized model reads the text, block after block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from quantkit.errors import ConversionError
from quantkit.formats.gguf import architectures
from quantkit.formats.gguf.architectures import Tensor, transforms
from quantkit.formats.gguf.imatrix import HOW_TO_MAKE, ImportanceMatrix, InputSquares
from quantkit.models.unstacked import stacks_of
from quantkit.system.files import replacing, sha256_json
from quantkit.system.home import home
from quantkit.system.progress import say, track

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quantkit.data.calibration import Calibration
    from quantkit.decoder.blocks import DecoderBlocks
    from quantkit.models.checkpoint import Checkpoint

_LATENT = (transforms.latent_keys, transforms.latent_values)


def importance(
    checkpoint: Checkpoint,
    calibration: Calibration,
    *,
    compute: Callable[[Calibration], ImportanceMatrix],
    by: str,
) -> ImportanceMatrix:
    """What ``compute`` gives, or gave before for the same weights and the same tokens.

    ``by``: whose computation it is.
    """
    made_of = [
        by,
        checkpoint.sha256,
        calibration.record.model_dump(),
        str(calibration.precision),
    ]
    kept = home() / "imatrix" / f"{sha256_json(made_of)}.gguf"
    if kept.is_file():
        say(f"imatrix: computed already ({kept})")
        return ImportanceMatrix.read(kept)
    found = compute(calibration)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as partial:
        found.write(partial)
    return found


def check_computable(checkpoint: Checkpoint) -> None:
    """Raise ConversionError for a model whose blocks quantkit cannot run, or for whose tensors it
    has no names in a GGUF."""
    from quantkit.decoder.blocks import DecoderBlocks

    if checkpoint.architecture not in architectures.SUPPORTED:
        raise ConversionError(
            f"{checkpoint.id}: quantkit computes importance matrices for what it converts to GGUF "
            f"itself, not for {checkpoint.architecture}; bring a file (--imatrix): {HOW_TO_MAKE}"
        )
    try:
        DecoderBlocks(checkpoint)
    except ConversionError as error:
        raise ConversionError(f"{error}; or bring a file (--imatrix): {HOW_TO_MAKE}") from error


def compute(checkpoint: Checkpoint, calibration: Calibration) -> ImportanceMatrix:
    """Run the calibration's windows through the unquantized model, block by block.

    Σx² of every matrix of every block, as llama-imatrix counts it: over all tokens of a window,
    without the output layer; of a stack, for each expert over the tokens that it gets. The windows
    are taken as they are, where llama-imatrix begins each with a BOS if the model wants one. Raise
    ConversionError as ``check_computable``.
    """
    import torch

    from quantkit.decoder.blocks import DecoderBlocks

    check_computable(checkpoint)
    blocks = DecoderBlocks(checkpoint, calibration.device, calibration.precision)
    config = architectures.config_of(checkpoint)
    tensors = architectures.layout(checkpoint, config)
    columns = {t.name: t.transform for t in tensors if t.transform in transforms.COLUMNS}
    entries = {}
    hidden = blocks.embed(calibration.ids)
    for index in track(range(len(blocks)), "imatrix: blocks"):
        block = blocks.load(index)
        watched = _watch(block, blocks, index, tensors)
        for number, batch in enumerate(hidden):
            hidden.replace(number, blocks.run(index, block, batch))
        for name, matrices in watched.items():
            sums = torch.stack([squares.sums for squares in matrices]).float().cpu()
            reorder = columns.get(name)
            entries[name] = InputSquares(
                (reorder(sums, config) if reorder else sums).contiguous().numpy(),
                np.array([squares.tokens for squares in matrices], np.float32),
            )
    record = calibration.record
    return ImportanceMatrix(entries, record.datasets, record.samples, record.sequence_length)


class _Squares:
    """Adds up the squares of what a matrix is multiplied with, per channel."""

    def __init__(self, weight: torch.Tensor, channels: int) -> None:
        import torch

        self.sums = torch.zeros(channels, dtype=torch.float64, device=weight.device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """``inputs``: (..., channels)."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.sums += x.square().sum(0).double()
        self.tokens += len(x)


def _watch(
    block: nn.Module, blocks: DecoderBlocks, index: int, tensors: Iterable[Tensor]
) -> dict[str, list[_Squares]]:
    """The watcher of each of the block's matrices, by the GGUF's ``tensors`` that they become."""
    state = block.state_dict()
    names: dict[str, list[str]] = {}
    for name, source in blocks.stored(index).items():
        if state[name].ndim == 2:
            (stored,) = stacks_of(blocks.checkpoint, [source])
            names.setdefault(stored, []).append(name)
    watched = {}
    for tensor in tensors:
        matrices = [name for source in tensor.sources for name in names.get(source, ())]
        if len(tensor.shape) == 3 and len(tensor.sources) == 1 and tensor.transform not in _LATENT:
            # Of the parts of an expert that lie in one stack one will do: they have one input.
            matrices = matrices[:: max(1, len(matrices) // tensor.shape[0])]
        if matrices:
            watched[tensor.name] = [_watched(block, name, tensor) for name in matrices]
    return watched


def _watched(block: nn.Module, name: str, tensor: Tensor) -> _Squares:
    """What watches the matrix ``name`` of the block."""
    owner = name.removesuffix(".weight")
    if tensor.transform in _LATENT:
        from quantkit.producers.gguf import latents

        heads, *_, channels = tensor.shape
        squares = _Squares(block.get_parameter(name), heads * channels)
        watch = latents.WATCH[tensor.transform]
        watch(block.get_submodule(owner.rpartition(".")[0]), squares.add)
        return squares
    squares = _Squares(block.get_parameter(name), tensor.shape[-1])
    block.get_submodule(owner).register_forward_pre_hook(lambda _, inputs: squares.add(inputs[0]))
    return squares
