"""The weights of a GGUF in the place of those of the checkpoint that it was made from.

With them transformers computes what quantization did to the weights, and nothing else: no kernel
of llama.cpp's, no rounding of activations, no 16-bit cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import IncompatibleVariant
from quantkit.formats.gguf import architectures
from quantkit.formats.gguf.architectures import inverses
from quantkit.formats.gguf.architectures.architecture import Transform
from quantkit.formats.gguf.architectures.config import resolve
from quantkit.formats.gguf.gguf_source import GGUFContent, GGUFSource
from quantkit.formats.gguf.model_file import StoredTensor, stored_bytes
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.tensors import TensorInfo

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the checkpoint lies in the GGUF, and what was made of it there."""

    stored: StoredTensor
    transform: Transform | None
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class UnpackedGGUF(Checkpoint):
    """An opened GGUF under the names and in the shapes of its source's tensors.

    ``read`` unpacks one tensor at a time, as ggml does (for the types that it knows, equal to
    ``gguf.quants.dequantize``), and undoes what the conversion did to it. What the source has and
    the GGUF lacks (an output layer that is tied, buffers) is not among ``tensors``.
    """

    source: Checkpoint = field(kw_only=True)
    file: GGUFSource = field(kw_only=True)
    places: dict[str, list[_Place]] = field(kw_only=True, repr=False)

    @classmethod
    def of(cls, source: Checkpoint, path: Path) -> UnpackedGGUF:
        """``path``, a GGUF file or the first of its parts, as ``source`` would hold it.

        Raise IncompatibleVariant for an architecture whose tensors cannot be turned back and for
        a file that was not made from this source.
        """
        if source.architecture not in architectures.SUPPORTED:
            raise IncompatibleVariant(
                f"{path}: a {source.architecture}, whose GGUF quantkit does not turn back into "
                f"weights for transformers; it does so for {', '.join(architectures.SUPPORTED)}"
            )
        file = GGUFSource.of_file(path, allow_requantize=True)
        stored = {tensor.name: tensor for tensor in file.file.tensors}
        places: dict[str, list[_Place]] = {}
        for made in architectures.layout(source, architectures.config_of(source)):
            there = stored.get(made.name)
            # llama.cpp's quantizer leaves out leading ones.
            if there is None or _shortened(there.shape) != _shortened(made.shape):
                found = "no such tensor" if there is None else f"shape {list(there.shape)}"
                raise IncompatibleVariant(
                    f"{path}: {made.name} {list(made.shape)}: {found} in it; it was not made from "
                    f"{source.id}"
                )
            count = len(made.sources)
            apart = _parts(there, count) if made.stacked else [there] * count
            shape = made.shape[1:] if made.stacked else made.shape
            for name, part in zip(made.sources, apart, strict=True):
                places.setdefault(name, []).append(_Place(part, made.transform, shape))
        for name, found_in in places.items():
            if not inverses.invertible([place.transform for place in found_in]):
                raise IncompatibleVariant(
                    f"{path}: what conversion to GGUF does to {name} cannot be undone"
                )
        tensors = {
            name: TensorInfo(name, "F32", source.tensors[name].shape, path) for name in places
        }
        return cls(
            id=file.id,
            path=path,
            revision=None,
            config=source.config,
            tensors=tensors,
            source=source,
            file=file,
            places=places,
        )

    def read(self, name: str) -> torch.Tensor:
        """One of the source's tensors, in the type that the GGUF has it in, or float32 where it is
        quantized."""
        content = GGUFContent(self.file)
        found = [
            (place.transform, content.read(place.stored).reshape(place.shape))
            for place in self.places[name]
        ]
        return inverses.restore(found, self._names)

    @cached_property
    def _names(self) -> dict[str, Any]:
        """The source's configuration, as transforms know it."""
        return resolve(architectures.config_of(self.source))

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Digest of every part of the GGUF, by file name."""
        return self.file.sha256

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """The source's."""
        return self.source.hf_config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The source's."""
        return self.source.tokenizer


def _shortened(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape


def _parts(stack: StoredTensor, count: int) -> list[StoredTensor]:
    """Its parts, each to be read alone: they lie one after another, and no block is in two."""
    one = replace(stack, shape=stack.shape[1:])
    size = stored_bytes(one)
    return [replace(one, start=stack.start + index * size) for index in range(count)]
