"""GGUF, llama.cpp's format: one file, or several parts, with everything that is needed inside."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError
from quantkit.models.chat_template import templates_in_gguf
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.gguf_files import SUFFIX
from quantkit.models.variant import IMATRIX, Model, Variant


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
        from quantkit.formats.gguf.model_file import ModelFile

        file = ModelFile.open(model.weights)
        found = file.metadata.get(f"{file.architecture}.context_length")
        if not isinstance(found, int):
            raise CheckpointError(f"{model.weights}: its metadata give no context_length")
        return found

    def chat_templates(self, model: Model) -> dict[str, str]:
        """Those inside the file."""
        from quantkit.formats.gguf.model_file import ModelFile

        return templates_in_gguf(ModelFile.open(model.weights).metadata)

    def vocabulary(self, model: Model) -> list[str] | None:
        """As ``Format.vocabulary``."""
        from quantkit.formats.gguf.model_file import ModelFile

        tokens = ModelFile.open(model.weights).array("tokenizer.ggml.tokens")
        return list(map(str, tokens))

    def served_bytes(self, model: Model) -> Mapping[str, int]:
        """What is stored: llama.cpp computes with the file as it is."""
        from quantkit.formats.gguf.model_file import ModelFile, stored_bytes

        tensors = ModelFile.open(model.weights).tensors
        return {tensor.name: stored_bytes(tensor) for tensor in tensors}

    def experts(self, model: Model) -> tuple[int, int]:
        """As the metadata have it."""
        from quantkit.formats.gguf.model_file import ModelFile

        file = ModelFile.open(model.weights)
        count, chosen = (
            int(file.metadata.get(f"{file.architecture}.{key}", 0))
            for key in ("expert_count", "expert_used_count")
        )
        return count, chosen

    def bits_per_weight(self, variant: Variant, source: Checkpoint) -> tuple[float, float | None]:
        """Of all tensors; their names are not the source's."""
        return sum(self.served_bytes(variant).values()) * 8 / source.parameters, None

    def source(self, variant: Variant, *, allow_requantize: bool) -> Checkpoint | None:
        """As ``Format.source``: of other GGUF files alone."""
        from quantkit.formats.gguf.gguf_source import GGUFSource

        return GGUFSource.of_file(variant.weights, allow_requantize=allow_requantize)

    def unpacked(self, variant: Variant, source: Checkpoint) -> Checkpoint:
        """As ``Format.unpacked``: under the names of the source's tensors."""
        from quantkit.formats.gguf.unpacked import UnpackedGGUF

        return UnpackedGGUF.of(source, variant.weights)
