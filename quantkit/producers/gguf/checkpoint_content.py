"""A transformers checkpoint as what a GGUF is made from."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf

from quantkit.errors import CheckpointError, reading
from quantkit.formats.gguf import architectures
from quantkit.formats.gguf.chat import chat_fields
from quantkit.formats.gguf.fields import packed_fields
from quantkit.formats.gguf.file_types import FILE_TYPES, UNQUANTIZED
from quantkit.models.chat_template import chat_templates
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.end_tokens import end_ids
from quantkit.models.text_part import is_part, text_config
from quantkit.producers.gguf.model_card import read_model_card
from quantkit.producers.gguf.tokenizer import read_tokenizer
from quantkit.system.json_file import load_json

if TYPE_CHECKING:
    import torch

    from quantkit.formats.gguf.architectures import Tensor
    from quantkit.formats.gguf.ggml import TensorType
    from quantkit.producers.gguf.tokenizer import Tokenizer


_SAMPLING = {
    "top_k": "sampling_top_k",
    "top_p": "sampling_top_p",
    "min_p": "sampling_min_p",
    "temperature": "sampling_temp",
    "repetition_penalty": "sampling_penalty_repeat",
}
"""Keys of a generation config, and what ``gguf`` calls them."""


class CheckpointContent:
    """A transformers checkpoint, converted as llama.cpp's ``convert_hf_to_gguf.py`` does.

    Raise CheckpointError or ConversionError, on construction, for what cannot be converted.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._architecture = architectures.architecture_of(checkpoint)
        self._config: dict[str, Any] = architectures.config_of(checkpoint)
        with reading(checkpoint.path / "config.json"):
            architectures.check_config(self._config)
            self.tensors = architectures.layout(checkpoint, self._config)
        self.name = model_name(checkpoint)
        self.architecture = self._architecture.name
        self.base = own_type(checkpoint)
        self.direct: tuple[str, ...] = UNQUANTIZED
        self._card, notes = read_model_card(checkpoint.path)
        windowed = self._architecture.sliding_window
        caveats = () if windowed else _caveats(checkpoint)
        self.notes = _left_out(checkpoint) + _rounded(checkpoint) + caveats + notes

    def type_of(self, tensor: Tensor, scheme: str) -> str:
        """Vectors and norms are float32 in every file: llama.cpp computes with nothing else."""
        return "F32" if tensor.float32 else scheme

    def metadata(self) -> dict[str, bytes]:
        """In the order in which llama.cpp's converter writes the keys."""
        writer, base = gguf.GGUFWriter(None, self.architecture), FILE_TYPES[self.base]
        writer.add_type(gguf.GGUFType.MODEL)
        self._general().set_gguf_meta_model(writer)
        with reading(self._checkpoint.path / "config.json"):
            architectures.add_hyperparameters(writer, self._architecture, self._config, base)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self._tokenizer.write(writer)
        with reading(f"{self._checkpoint.path}: its files as GGUF metadata"):
            return packed_fields(writer) | self._chat()

    def stored(self, _tensor: Tensor, _kind: TensorType) -> None:
        """Nothing lies in a checkpoint as it does in a GGUF."""

    def read(self, tensor: Tensor) -> torch.Tensor:
        """A view of the checkpoint's file, where the tensor lies there as llama.cpp wants it."""
        return architectures.read_tensor(self._checkpoint, tensor, self._config)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        with reading(f"{self._checkpoint.path}: unreadable tokenizer"):
            return read_tokenizer(self._checkpoint, self._config["vocab_size"])

    def _chat(self) -> dict[str, bytes]:
        roles, tokens = self._tokenizer.special.ids, self._tokenizer.tokens
        ends = end_ids(self._checkpoint.path, roles.get("eos"))
        return chat_fields(
            chat_templates(self._checkpoint.path),
            [end for end in ends if end < len(tokens)],
            roles,
            lambda end: tokens[end].text.decode(errors="replace"),
        )

    def _general(self) -> gguf.Metadata:
        """The ``general.*`` keys: name, size label, and what the model card and the generation
        config say; ``gguf``'s own reading of them, which llama.cpp's converter uses too."""
        checkpoint = self._checkpoint
        total, shared, expert, experts = self._parameter_counts()
        name = checkpoint.id if checkpoint.revision else checkpoint.config.get("_name_or_path")
        metadata = gguf.Metadata.apply_metadata_heuristic(
            gguf.Metadata(),
            self._card,
            {"_name_or_path": name} if isinstance(name, str) else {},
            Path(self.name),
            total,
        )
        metadata.name = metadata.name or self.name
        metadata.size_label = metadata.size_label or gguf.size_label(total, shared, expert, experts)
        for key, name in _SAMPLING.items():
            setattr(metadata, name, self._sampling(key))
        return metadata

    def _sampling(self, key: str) -> float | None:
        """A number of the generation config."""
        file = self._checkpoint.path / "generation_config.json"
        value = load_json(file).get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not abs(value) < 2**31:
            raise CheckpointError(f"{file}: {key} is {value!r}, expected a number")
        return int(value) if key == "top_k" else value

    def _parameter_counts(self) -> tuple[int, int, int, int]:
        """The parameters of all layers, of what every token passes and of one expert; and the
        number of experts."""
        import numpy as np

        writer = gguf.GGUFWriter(None, self.architecture)
        for tensor in self.tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 0)
        counts: tuple[int, int, int, int] = writer.get_total_parameter_count()
        return counts


def model_name(checkpoint: Checkpoint) -> str:
    """A hub id's last part, or the directory's name: ``SmolLM2-135M``."""
    return checkpoint.id.rpartition("/")[2] if checkpoint.revision else checkpoint.path.name


def own_type(checkpoint: Checkpoint) -> str:
    """The checkpoint's own 16-bit type, F32 where it has several."""
    dtypes = {info.dtype for info in checkpoint.tensors.values() if len(info.shape) > 1}
    only = dtypes.pop() if len(dtypes) == 1 else "F32"
    return only if only in UNQUANTIZED else "F32"


def _left_out(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What of the checkpoint is not in the file."""
    notes = []
    if is_part(checkpoint):
        notes.append("only the language model is in the file, not what sees or hears")
    if any(name.startswith("mtp.") for name in checkpoint.tensors):
        notes.append("the block that drafts tokens (mtp) is not in the file")
    return tuple(notes)


def _rounded(checkpoint: Checkpoint) -> tuple[str, ...]:
    """gpt-oss's YaRN; that of all others is refused where it is so (see ``limits``)."""
    rope = getattr(text_config(checkpoint), "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn" or rope.get("truncate", True):
        return ()
    return ("llama.cpp rounds the channels between which YaRN blends; the source does not",)


def _caveats(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What llama.cpp computes differently, and does not refuse."""
    config = text_config(checkpoint)
    window = getattr(config, "sliding_window", None)
    if not window or window >= config.max_position_embeddings:
        return ()
    return (f"llama.cpp attends to the whole context, not to a sliding window of {window} tokens",)
