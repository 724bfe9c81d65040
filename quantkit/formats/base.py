"""What a format is: say what a conversion would give, make it, describe what is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from quantkit.checkpoint import Checkpoint
from quantkit.spec import Spec
from quantkit.variant import BlockRecord, LossRecord, StructureRecord, Variant

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
    tokenizer_differences: tuple[str, ...] = ()
    """How text will be read by other token ids than the source's: to be allowed by the user."""
    options: dict[str, Any] = field(default_factory=dict)
    """Every option as resolved, as JSON values: with source, scheme and calibration they tell a
    variant from another one."""


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
    blocks: tuple[BlockRecord, ...] = ()
    """How far each block's output moved, where one after another was quantized."""
    structure: tuple[StructureRecord, ...] = ()
    """What the blocks are made of, by kind, where they were asked."""
    held_out: dict[str, LossRecord] = field(default_factory=dict)
    """By kind of text that the quantizer did not see."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage (``load``, ``forward``, ``solve`` …), where the format counts them."""
    peak_device_bytes: int | None = None
    """The most memory held on the GPU; None where none was used."""
    peak_rss_bytes: int | None = None
    """Of the process that did the work, where that was not this one."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Digests of files by name, of those that were hashed on the way."""


class Maker(Protocol):
    """What makes variants of a format: the format itself, or a package (``quantkit.producers``)."""

    resumes: bool
    """Whether ``convert`` goes on with what an interrupted attempt left in its directory."""

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

        ``directory`` exists and is temporary; it is empty but for what an interrupted attempt at
        the same left, where the format ``resumes``. Tokenizer files and the manifest are added by
        the caller (``quantkit.convert``).
        """
        ...


class Format(Maker, Protocol):
    """One on-disk layout. Register a new one in ``quantkit.formats.FORMATS``."""

    name: str

    def inspect(self, variant: Variant) -> dict[str, Any]:
        """Facts about weights of this format on disk, ours or others', as JSON values."""
        ...


@runtime_checkable
class SharesReading(Protocol):
    """A format that makes several variants of a source in one pass over its weights."""

    def convert_many(
        self,
        checkpoint: Checkpoint,
        targets: Mapping[Spec, Path],
        calibration: Calibration | None,
    ) -> dict[Spec, Converted | Exception]:
        """``Format.convert`` for each spec, into its directory. One that fails is given back as
        its error, what it wrote is left to the caller, and the others go on."""
        ...
