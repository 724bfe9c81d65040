"""A GGUF in the place of a checkpoint, to make other GGUF files of it as llama-quantize does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.gguf import file_types, ggml
from quantkit.formats.gguf.chat import replaced
from quantkit.formats.gguf.ggml import TensorType
from quantkit.formats.gguf.model_file import ModelFile, StoredTensor, read_bytes, type_name
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.tensors import TensorInfo
from quantkit.system.files import sha256_file

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_LAYOUT_KEYS = ("general.alignment", "split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, eq=False)
class GGUFSource(Checkpoint):
    """An opened GGUF; only GGUF files can be made of it.

    ``id`` is the file's name, ``path`` its directory; the tensors have llama.cpp's names and
    ggml's types.
    """

    file: ModelFile = field(kw_only=True)
    chat: Mapping[str, bytes] | None = field(default=None, kw_only=True)
    """What is written in place of all that the file says of chats; see ``chat_fields``."""

    format = "gguf"

    @classmethod
    def of_file(cls, path: Path, *, allow_requantize: bool) -> GGUFSource:
        """Open the file, or the first of its parts.

        Raise CheckpointError where it is damaged, incomplete or no model, ConversionError where
        it is quantized and ``allow_requantize`` is not given.
        """
        file = ModelFile.open(path.absolute())
        if file.missing:
            raise CheckpointError(f"{path}: {file.missing[0]} is missing beside it; download it")
        if file.metadata.get("general.type", "model") != "model" or not file.tensors:
            kind = file.metadata.get("general.type", "vocabulary")
            raise CheckpointError(f"{path}: is a GGUF of the type {kind!r}, not of a model")
        for tensor in file.tensors:
            read_bytes(tensor)  # refuses a file that is cut off
        quantized = _quantized_types(file)
        if quantized and not allow_requantize:
            raise ConversionError(
                f"{path}: is quantized already ({', '.join(quantized)}), and what that lost stays "
                "lost; convert from the checkpoint or an unquantized GGUF, or pass "
                "--allow-requantize"
            )
        tensors = {
            tensor.name: TensorInfo(tensor.name, type_name(tensor.type), tensor.shape, tensor.file)
            for tensor in file.tensors
        }
        return cls(file.name, file.files[0].parent, None, {}, tensors, file=file)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it: ``llama``."""
        return str(self.file.architecture)

    @property
    def weights(self) -> Path:
        """The file, or the first of its parts."""
        return self.file.files[0]

    @property
    def bytes(self) -> int:
        """Bytes of all parts on disk."""
        return self.file.bytes

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Digest of every part, by file name."""
        return {file.name: sha256_file(file) for file in self.file.files}

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """There is none."""
        self._refuse("a config.json")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """There is none for calibration text, which could not be run through the GGUF either."""
        self._refuse("calibration text")

    def _refuse(self, what: str) -> NoReturn:
        raise ConversionError(
            f"{self.weights}: a GGUF is converted to other GGUF files only, without {what}"
        )


class GGUFContent:
    """The tensors and metadata of a GGUF; see ``Content``.

    Nothing is written "directly": llama.cpp's quantizer decides on every type.
    """

    direct: tuple[str, ...] = ()

    def __init__(self, source: GGUFSource) -> None:
        self._file = source.file
        self._chat = source.chat
        own = file_types.name_of(source.file.metadata.get("general.file_type"))
        self.name = re.sub(rf"[-._]{re.escape(own)}$", "", source.id, flags=re.IGNORECASE)
        self.architecture = source.architecture
        self.base = own if own in file_types.FILE_TYPES else "F32"
        quantized = ", ".join(_quantized_types(source.file))
        self.notes: tuple[str, ...] = (
            (f"made from weights that were quantized before, to {quantized}",) if quantized else ()
        )

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """In file order."""
        return self._file.tensors

    def type_of(self, tensor: StoredTensor, _scheme: str) -> str:
        """The type in which it is stored."""
        return type_name(tensor.type)

    def metadata(self) -> dict[str, bytes]:
        """All keys as they stand in the file, but for those that say how it is laid out."""
        stored = self._file.headers[0].stored
        kept = {key: value for key, value in stored.items() if key not in _LAYOUT_KEYS}
        return kept if self._chat is None else replaced(kept, self._chat)

    def stored(self, tensor: StoredTensor, kind: TensorType) -> memoryview | None:
        """The tensor's bytes where it is of this type; raise ConversionError where they are no
        numbers."""
        if kind.number != tensor.type:
            return None
        data = read_bytes(tensor)
        if not ggml.is_valid(kind.number, data.ctypes.data, len(data)):
            raise ConversionError(f"gguf: {tensor.name} holds NaN or infinity: the file is bad")
        return data.data

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The values: mapped where they are floats, unpacked by ggml where they are quantized.
        Whatever else there is, such as tables of integers, is copied: its values are not read."""
        import torch

        data, kind = read_bytes(tensor), ggml.numbered(tensor.type)
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        if kind and kind.name in plain:
            return torch.from_numpy(data).view(plain[kind.name]).view(tensor.shape)
        values = torch.empty(tensor.shape)
        if kind and kind.block > 1:
            ggml.unpacker(kind.number)(data.ctypes.data, values.data_ptr(), values.numel())
        return values


def _quantized_types(file: ModelFile) -> list[str]:
    kinds = {ggml.numbered(tensor.type) for tensor in file.tensors}
    return sorted(kind.name for kind in kinds if kind and kind.block > 1)
