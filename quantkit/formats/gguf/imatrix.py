"""The importance matrix: how strongly calibration text excites each input channel of a linear.

llama.cpp's quantizer weighs the error of a column by it. The file format is llama.cpp's own
(``imatrix.gguf``, and the ``.dat`` of before July 2025, which is read only), so that files of
``llama-imatrix`` serve here and ours serve in ``llama-quantize``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import quantkit
from quantkit.errors import CheckpointError, ConversionError
from quantkit.files import sha256_json
from quantkit.home import home
from quantkit.progress import say, track

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quantkit.calibration import Calibration
    from quantkit.checkpoint import Checkpoint

_SUMS, _COUNTS = ".in_sum2", ".counts"
_HOW_TO_MAKE = "llama-imatrix -m model-f16.gguf -f text.txt -o imatrix.gguf makes one"


@dataclass(frozen=True)
class InputSquares:
    """What one tensor was multiplied with.

    ``sums``: Σx² per input channel, (matrices, columns) float32; one matrix for a linear, one for
    each expert of a stack. ``counts``: how many tokens each matrix saw, (matrices,) float32.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]


@dataclass(frozen=True)
class ImportanceMatrix:
    """By name of the GGUF's tensor, its inputs; ``datasets`` and ``chunks`` (of ``chunk_size``
    tokens) say on what text. ``chunk_size`` is 0 where an old file does not say."""

    entries: Mapping[str, InputSquares]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int

    def weights(self, tensor: str) -> NDArray[np.float32] | None:
        """What the quantizer weighs each column with, matrix after matrix, flat; None where this
        tensor was not observed. A matrix that saw no token, as a rare expert, weighs all alike."""
        entry = self.entries.get(tensor)
        if entry is None:
            return None
        seen = entry.counts[:, None] > 0
        counts = np.where(seen, entry.counts[:, None], np.float32(1))
        return np.where(seen, entry.sums / counts, np.float32(1)).ravel()

    @classmethod
    def read(cls, path: Path) -> ImportanceMatrix:
        """Read a file of llama-imatrix, of either format, or of ours.

        Raise CheckpointError where it is none, is truncated, or holds values that are not finite.
        """
        try:
            with path.open("rb") as file:
                is_gguf = file.read(4) == b"GGUF"
        except OSError as error:
            raise CheckpointError(f"{path}: importance matrix: {error.strerror}") from error
        found = _read_gguf(path) if is_gguf else _read_legacy(path)
        for name, entry in found.entries.items():
            if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()):
                raise CheckpointError(
                    f"{path}: the importance of {name} is not finite; {_HOW_TO_MAKE} anew"
                )
        return found

    def write(self, path: Path) -> None:
        """Write ``imatrix.gguf`` as llama-imatrix does, byte for byte."""
        import gguf

        class Writer(gguf.GGUFWriter):  # type: ignore[misc]
            def add_architecture(self) -> None:
                """An importance matrix names none."""

        writer = Writer(path, "")
        writer.add_type(gguf.GGUFType.IMATRIX)
        # The reader insists on the key, and an empty array cannot be written.
        writer.add_array("imatrix.datasets", list(self.datasets) or ["unknown"])
        writer.add_uint32("imatrix.chunk_count", self.chunks)
        writer.add_uint32("imatrix.chunk_size", self.chunk_size)
        for name, entry in sorted(self.entries.items()):
            one = len(entry.counts) == 1  # ggml drops the axes of length 1 at the end
            writer.add_tensor(name + _SUMS, entry.sums[0] if one else entry.sums)
            writer.add_tensor(name + _COUNTS, entry.counts if one else entry.counts[:, None])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def importance(checkpoint: Checkpoint, calibration: Calibration) -> ImportanceMatrix:
    """``compute``, or what it gave before for the same weights and the same tokens."""
    made_of = [
        quantkit.__version__,
        checkpoint.sha256,
        calibration.record.model_dump(),
        str(calibration.precision),
    ]
    kept = home() / "imatrix" / f"{sha256_json(made_of)}.gguf"
    if kept.is_file():
        say(f"imatrix: computed already ({kept})")
        return ImportanceMatrix.read(kept)
    found = compute(checkpoint, calibration)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_name(f".{kept.name}.{os.getpid()}")
    try:
        found.write(partial)
        partial.replace(kept)
    finally:
        partial.unlink(missing_ok=True)
    return found


def check_computable(checkpoint: Checkpoint) -> None:
    """Raise ConversionError for an architecture whose blocks quantkit cannot run."""
    from quantkit.blocks import ARCHITECTURES

    if checkpoint.architecture not in ARCHITECTURES:
        raise ConversionError(
            f"{checkpoint.id}: quantkit computes importance matrices for "
            f"{', '.join(ARCHITECTURES)}, not for {checkpoint.architecture}; bring a file "
            f"(--imatrix): {_HOW_TO_MAKE}"
        )


def compute(checkpoint: Checkpoint, calibration: Calibration) -> ImportanceMatrix:
    """Run the calibration's windows through the unquantized model, block by block.

    Σx² of every linear of every block, as llama-imatrix counts it: over all tokens of a window,
    without the output layer. The windows are taken as they are, where llama-imatrix begins each
    with a BOS if the model wants one. Raise ConversionError as ``check_computable``.
    """
    from quantkit.blocks import DecoderBlocks

    check_computable(checkpoint)
    blocks = DecoderBlocks(checkpoint, calibration.device, calibration.precision)
    names = _gguf_names(checkpoint)
    entries = {}
    hidden = blocks.embed(calibration.ids)
    for index in track(range(len(blocks)), "imatrix: blocks"):
        block = blocks.load(index)
        squares = [_Squares(block.get_submodule(linear)) for linear in blocks.linears]
        for number, batch in enumerate(hidden):
            hidden.replace(number, blocks.run(index, block, batch))
        for linear, seen in zip(blocks.linears, squares, strict=True):
            for name in names[f"{blocks.prefix(index)}{linear}.weight"]:
                entries[name] = seen.result()
    record = calibration.record
    return ImportanceMatrix(entries, (record.dataset,), record.samples, record.sequence_length)


class _Squares:
    """Watches a linear and adds up the squares of its inputs, per channel."""

    def __init__(self, linear: nn.Module) -> None:
        self._sums: torch.Tensor | float = 0.0
        self._tokens = 0
        linear.register_forward_pre_hook(self._add)

    def _add(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        self._sums = self._sums + x.square().sum(0).double()
        self._tokens += len(x)

    def result(self) -> InputSquares:
        sums: Any = self._sums
        return InputSquares(sums.float().cpu().numpy()[None], np.array([self._tokens], np.float32))


def _gguf_names(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """By the name of a checkpoint's tensor, the tensors of the GGUF that hold its rows."""
    from quantkit.formats.gguf import architectures

    names: dict[str, list[str]] = {}
    for tensor in architectures.layout(checkpoint, checkpoint.hf_config.to_dict()):
        for source in tensor.sources:
            names.setdefault(source, []).append(tensor.name)
    return names


def _read_gguf(path: Path) -> ImportanceMatrix:
    from quantkit.formats.gguf.model_file import ModelFile, read_bytes

    file = ModelFile.open(path)
    arrays: dict[str, NDArray[np.float32]] = {}
    for tensor in file.tensors:
        if not tensor.name.endswith((_SUMS, _COUNTS)) or tensor.type != 0:
            break
        arrays[tensor.name] = np.array(read_bytes(tensor)).view("<f4")
    names = [name.removesuffix(_SUMS) for name in arrays if name.endswith(_SUMS)]
    metadata = file.metadata
    if not names or len(arrays) != len(file.tensors):
        kind = metadata.get("general.type", "of no type")
        raise CheckpointError(
            f"{path}: not an importance matrix, but a GGUF that is {kind!r}; {_HOW_TO_MAKE}"
        )
    entries = {}
    for name in names:
        counts = arrays.get(name + _COUNTS)
        sums = arrays[name + _SUMS]
        if counts is None or not counts.size or sums.size % counts.size:
            raise CheckpointError(f"{path}: the counts of {name} are missing or do not fit")
        entries[name] = InputSquares(sums.reshape(len(counts), -1), counts.round())
    return ImportanceMatrix(
        entries,
        tuple(metadata.get("imatrix.datasets", ())),
        int(metadata.get("imatrix.chunk_count", 0)),
        int(metadata.get("imatrix.chunk_size", 0)),
    )


def _read_legacy(path: Path) -> ImportanceMatrix:
    """``.dat``: a count of entries, then each one's name, calls, and values (sums over calls)."""
    data = path.read_bytes()
    at = 0

    def number() -> int:
        nonlocal at
        (value,) = struct.unpack_from("<i", data, at)
        at += 4
        return int(value)

    def take(size: int) -> bytes:
        nonlocal at
        if not 0 <= size <= len(data) - at:
            raise ValueError(size)
        at += size
        return data[at - size : at]

    entries, chunks, datasets = {}, 0, ""
    try:
        for _ in range(number()):
            name = take(number()).decode()
            calls = max(1, number())  # none: the values are taken as they are
            values = np.frombuffer(take(4 * number()), "<f4")
            entries[name] = InputSquares(values[None], np.array([calls], np.float32))
        if at < len(data):
            chunks = number()
            datasets = take(number()).decode()
    except (struct.error, ValueError) as error:
        raise CheckpointError(
            f"{path}: not an importance matrix, neither GGUF nor .dat, or a truncated one; "
            f"{_HOW_TO_MAKE}"
        ) from error
    if not entries:
        raise CheckpointError(f"{path}: an importance matrix without entries; {_HOW_TO_MAKE}")
    return ImportanceMatrix(entries, (datasets,) if datasets else (), chunks, 0)
