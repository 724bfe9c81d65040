"""GGUF, llama.cpp's format: one file, or several parts, with everything that is needed inside."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError
from quantkit.formats.base import ServedWeights
from quantkit.models.chat_template import templates_in_gguf
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.gguf_files import SUFFIX
from quantkit.models.variant import IMATRIX, Model, Variant

if TYPE_CHECKING:
    from quantkit.formats.gguf.model_file import ModelFile


class GGUF:
    """Files of any of llama.cpp's types; see ``Format``."""

    name = "gguf"

    def detect(self, path: Path) -> Variant | None:
        """A GGUF file, or the only model in a directory without safetensors."""
        from quantkit.formats.gguf import file_types
        from quantkit.formats.gguf.model_file import ModelFile, gguf_at

        found = gguf_at(path)
        if found is None:
            return None
        model = ModelFile.open(found)
        scheme = file_types.name_of(model.metadata.get("general.file_type"))
        return Variant(model.name, found, self.name, scheme, None, model.files)

    def files(self, path: Path, names: Collection[str]) -> tuple[Path, ...]:
        """As ``Format.files``: all parts."""
        return tuple(path / n for n in sorted(names) if n.endswith(SUFFIX) and n != IMATRIX)

    def inspect(self, model: Model) -> dict[str, Any]:
        """As ``Format.inspect``: what the file says about itself."""
        from quantkit.formats.gguf.inspection import inspect

        return inspect(model.weights)

    def context_length(self, model: Model) -> int:
        """As ``Format.context_length``."""
        file = _opened(model)
        found = file.metadata.get(f"{file.architecture}.context_length")
        if not isinstance(found, int):
            raise CheckpointError(f"{model.weights}: its metadata give no context_length")
        return found

    def chat_templates(self, model: Model) -> dict[str, str]:
        """The chat templates inside the file."""
        return templates_in_gguf(_opened(model).metadata)

    def vocabulary(self, model: Model) -> list[str] | None:
        """As ``Format.vocabulary``."""
        return list(map(str, _opened(model).array("tokenizer.ggml.tokens")))

    def served_weights(self, model: Model) -> ServedWeights:
        """What is stored: llama.cpp computes with the file as it is."""
        from quantkit.formats.gguf.model_file import stored_bytes

        file = _opened(model)
        count, chosen = (
            int(file.metadata.get(f"{file.architecture}.{key}", 0))
            for key in ("expert_count", "expert_used_count")
        )
        sizes = {tensor.name: stored_bytes(tensor) for tensor in file.tensors}
        return ServedWeights(sizes, count, chosen)

    def bits_per_weight(self, variant: Variant, source: Checkpoint) -> tuple[float, float | None]:
        """Bits per weight of all tensors; their names are not the source's."""
        return sum(self.served_weights(variant).sizes.values()) * 8 / source.parameters, None

    def source(self, variant: Variant, *, allow_requantize: bool) -> Checkpoint | None:
        """As ``Format.source``, for making other GGUF files only."""
        from quantkit.formats.gguf.gguf_source import GGUFSource

        return GGUFSource.of_file(variant.weights, allow_requantize=allow_requantize)

    def unpacked(self, variant: Variant, source: Checkpoint) -> Checkpoint:
        """As ``Format.unpacked``: under the names of the source's tensors."""
        from quantkit.formats.gguf.unpacked import UnpackedGGUF

        return UnpackedGGUF.of(source, variant.weights)


def _opened(model: Model) -> ModelFile:
    from quantkit.formats.gguf.model_file import ModelFile

    return ModelFile.open(model.weights)
