"""What a GGUF is made from: tensors and metadata, whatever they are read from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from quantkit.formats.gguf.ggml import TensorType


class ContentTensor(Protocol):
    """One tensor of the GGUF; ``shape`` in torch's order (rows, columns)."""

    @property
    def name(self) -> str:
        """llama.cpp's name: ``blk.0.attn_q.weight``."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, the columns last."""
        ...


class Content(Protocol):
    """A source of GGUF files. What it holds does not change while it is used; two contents are
    equal only where they are the same object."""

    name: str
    """The model's name as files carry it: ``SmolLM2-135M``."""
    architecture: str
    """llama.cpp's: ``llama``."""
    base: str
    """The unquantized type that holds every value exactly. llama.cpp is asked how it would
    quantize a file of this type, and leaves what it does not quantize in it."""
    direct: tuple[str, ...]
    """The types in which the tensors are written as they are, in the content's own order. What
    goes into which other type is llama.cpp's choice."""
    notes: tuple[str, ...]
    """What a user should know of any file that is made from it."""

    @property
    def tensors(self) -> Sequence[ContentTensor]:
        """All tensors, in the order of an unquantized file."""
        ...

    def type_of(self, tensor: Any, scheme: str) -> str:
        """In which type (``F32``, ``F16``, ``BF16``) an unquantized file of the type ``scheme``,
        one of ``direct``, or of ``base`` stores one of ``tensors``."""
        ...

    def metadata(self) -> dict[str, bytes]:
        """All keys of a file of the type ``base``, in order, packed."""
        ...

    def stored(self, tensor: Any, kind: TensorType) -> memoryview | None:
        """The data of one of ``tensors`` where they are of this type already: they are copied, not
        unpacked and quantized once more."""
        ...

    def read(self, tensor: Any) -> torch.Tensor:
        """The values of one of ``tensors``, in the floating type in which they are stored.
        Called from a thread of its own, for one tensor at a time."""
        ...

    def __hash__(self) -> int: ...
