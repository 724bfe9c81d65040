"""What a format is: say what a conversion would give, make it, describe what is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantkit.checkpoint import Checkpoint
from quantkit.spec import Spec
from quantkit.variant import Variant

if TYPE_CHECKING:
    from quantkit.calibration import Calibration


@dataclass(frozen=True)
class Plan:
    """What a conversion will give, known before any long work."""

    spec: Spec
    bytes: int
    """Bytes of the weight files, exact where the format can know it."""
    bits_per_weight: float
    needs_calibration: bool
    notes: tuple[str, ...] = ()
    """What the user should know first, for example which tensors fall back to another type."""


@dataclass(frozen=True)
class Converted:
    """What a format wrote, for the manifest."""

    bits_per_weight: float
    """Bytes of all tensors x 8 / number of parameters of the source."""
    bits_per_weight_quantized: float | None
    """The same over the quantized linears only."""
    options: dict[str, Any] = field(default_factory=dict)
    """Every resolved option of the quantizer."""
    tools: dict[str, str] = field(default_factory=dict)
    """Name and version of what did the work, besides quantkit."""
    notes: tuple[str, ...] = ()


class Format(Protocol):
    """One on-disk layout. Register a new one in ``quantkit.formats.FORMATS``."""

    name: str

    def plan(self, checkpoint: Checkpoint, spec: Spec) -> Plan:
        """Refuse cheaply what cannot be made, and say what can: reads no tensor data.

        Raise RecipeError for an unknown scheme, ConversionError for a checkpoint that does not
        fit it, naming the layer.
        """
        ...

    def convert(
        self, checkpoint: Checkpoint, spec: Spec, calibration: Calibration | None, directory: Path
    ) -> Converted:
        """Write the weights, and the config where the format has one, into ``directory``.

        ``directory`` exists, is empty and temporary; tokenizer files and the manifest are added
        by the caller (``quantkit.convert``).
        """
        ...

    def inspect(self, variant: Variant) -> dict[str, Any]:
        """Facts about weights of this format on disk, ours or others', as JSON values."""
        ...
