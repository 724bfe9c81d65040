"""The importance matrix: how strongly calibration text excites each input channel of a linear.

llama.cpp's quantizer weighs the error of a column by it. The file format is llama.cpp's own
(``imatrix.gguf``, and the ``.dat`` of before July 2025, which is read only), so that files of
``llama-imatrix`` serve here and ours serve in ``llama-quantize``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import CheckpointError

_SUMS, _COUNTS = ".in_sum2", ".counts"
_UNUSED = ".in_sum"
"""Σx, which newer versions of llama-imatrix store for statistics."""
_STACK = ".ffn_down_exps.weight"
"""Ends the name of one of the stacks that a block has of its experts, which all see the same."""

HOW_TO_MAKE = "llama-imatrix -m model-f16.gguf -f text.txt -o imatrix.gguf makes one"


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

    def notes(self) -> tuple[str, ...]:
        """The experts that saw no token, and so have no importance: at most one line."""
        stacks = {
            int(name.split(".")[1]): entry.counts
            for name, entry in self.entries.items()
            if name.endswith(_STACK)
        }
        unseen = {block: np.flatnonzero(stacks[block] == 0) for block in sorted(stacks)}
        count = sum(map(len, unseen.values()))
        if not count:
            return ()
        where = "; ".join(
            f"blk.{block} {', '.join(map(str, experts))}"
            for block, experts in unseen.items()
            if len(experts)
        )
        return (
            f"imatrix: {count} of {sum(map(len, stacks.values()))} experts saw no token, so that "
            f"all their columns count alike ({where}); more calibration text reaches more of them",
        )

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
                    f"{path}: the importance of {name} is not finite; {HOW_TO_MAKE} anew"
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


def _read_gguf(path: Path) -> ImportanceMatrix:
    from quantkit.formats.gguf.model_file import ModelFile, read_bytes

    file = ModelFile.open(path)
    arrays: dict[str, NDArray[np.float32]] = {}
    tensors = [tensor for tensor in file.tensors if not tensor.name.endswith(_UNUSED)]
    for tensor in tensors:
        if not tensor.name.endswith((_SUMS, _COUNTS)) or tensor.type != 0:
            break
        arrays[tensor.name] = np.array(read_bytes(tensor)).view("<f4")
    names = [name.removesuffix(_SUMS) for name in arrays if name.endswith(_SUMS)]
    metadata = file.metadata
    if not names or len(arrays) != len(tensors):
        kind = metadata.get("general.type", "of no type")
        raise CheckpointError(
            f"{path}: not an importance matrix, but a GGUF that is {kind!r}; {HOW_TO_MAKE}"
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
            f"{HOW_TO_MAKE}"
        ) from error
    if not entries:
        raise CheckpointError(f"{path}: an importance matrix without entries; {HOW_TO_MAKE}")
    return ImportanceMatrix(entries, (datasets,) if datasets else (), chunks, 0)
