"""What a format is: finding what lies on disk, describing it, and giving back plain weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.variant import Model, Variant

if TYPE_CHECKING:
    import torch


class ServedWeights(NamedTuple):
    """``sizes``: bytes of each tensor, as an engine holds it. Of a mixture: how many ``experts``
    there are, and how many are ``chosen`` for each token; else 0."""

    sizes: Mapping[str, int]
    experts: int
    chosen: int


class Format(Protocol):
    """One on-disk layout: read, never made. Register a new one in ``quantkit.registry.FORMATS``.

    Methods that take a model take a variant of this format, or a checkpoint that is stored in it.
    """

    name: str

    def detect(self, path: Path) -> Variant | None:
        """What lies at ``path``, without a manifest, where it is of this format.

        Raise CheckpointError where it is damaged, IncompatibleVariant where it is not read.
        """
        ...

    def files(self, path: Path, names: Collection[str]) -> tuple[Path, ...]:
        """Of the files of a variant's directory, by their ``names``, those that an engine is
        given, the first alone or all parts; empty where engines are given the directory."""
        ...

    def inspect(self, model: Model) -> dict[str, Any]:
        """Facts for a reader, as JSON values."""
        ...

    def context_length(self, model: Model) -> int:
        """The most tokens that the model was made for; raise CheckpointError where it says none."""
        ...

    def chat_templates(self, model: Model) -> dict[str, str]:
        """The templates by which engines render chats, by name; empty where there are none."""
        ...

    def vocabulary(self, model: Model) -> list[str] | None:
        """The tokens that the weights' file itself holds; None where they lie beside it."""
        ...

    def served_weights(self, model: Model) -> ServedWeights:
        """What an engine holds of the weights."""
        ...

    def bits_per_weight(self, variant: Variant, source: Checkpoint) -> tuple[float, float | None]:
        """Bits per weight of all tensors, and of the quantized linears alone where their names are
        the source's: bytes x 8 / weights of ``source``."""
        ...

    def source(self, variant: Variant, *, allow_requantize: bool) -> Checkpoint | None:
        """The variant in the place of a checkpoint, to make others of it; None where it cannot be.

        Raise ConversionError where it is quantized, unless ``allow_requantize``.
        """
        ...

    def unpacked(self, variant: Variant, source: Checkpoint) -> Model:
        """What the reference engine loads to compute with these weights, and with nothing else of
        the variant's. Raise IncompatibleVariant where it was not made from ``source``."""
        ...


@runtime_checkable
class Dequantizes(Protocol):
    """A format whose weights are unpacked without the source that they were made from."""

    def dequantize(self, variant: Variant) -> Iterator[tuple[str, torch.Tensor]]:
        """The plain state dict, tensor by tensor; weights as (out, in) float32.

        Raise IncompatibleVariant for what is not unpacked.
        """
        ...


class QuantizedInputs(Protocol):
    """What the inputs of a variant's linears are rounded to as it is served."""

    @property
    def roundings(self) -> Mapping[str, Any]:
        """By the names of the linears' weights, in the source's words."""
        ...

    def rounded(self, weight: str, inputs: torch.Tensor) -> torch.Tensor:
        """``inputs`` (…, in) of one linear, as engines multiply them."""
        ...


@runtime_checkable
class QuantizesInputs(Protocol):
    """A format whose engines may quantize activations, too."""

    def quantized_inputs(self, variant: Variant) -> QuantizedInputs | None:
        """None where nothing but weights is quantized.

        Raise IncompatibleVariant for a rounding that quantkit does not compute.
        """
        ...
