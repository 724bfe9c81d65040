"""What a producer is: it says what a conversion would give, and makes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import BlockRecord, LossRecord, StructureRecord

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration


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
    """Where text will get other token ids than from the source's tokenizer: the user must allow
    it."""
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
    """Losses by kind of text that the quantizer did not see."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage (``load``, ``forward``, ``solve`` …), where the format counts them."""
    peak_device_bytes: int | None = None
    """The most memory held on the GPU; None where none was used."""
    peak_rss_bytes: int | None = None
    """The peak of the process that did the work, where it was not this one."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Digests of files by name, of those that were hashed on the way."""


class Producer(Protocol):
    """Who makes the weights of a format: quantkit, or a package.

    Register a new one in ``quantkit.registry``: in ``MADE_HERE`` by its format, or in
    ``PRODUCERS`` by its name; another package does so by an entry point ``quantkit.producers``.
    """

    formats: Collection[str]
    """The formats that it makes."""
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
        the same left, where the producer ``resumes``. Tokenizer files and the manifest are added
        by the caller (``quantkit.producers.convert``).
        """
        ...


@runtime_checkable
class SharesReading(Protocol):
    """A producer that makes several variants of a source in one pass over its weights."""

    def convert_many(
        self,
        checkpoint: Checkpoint,
        targets: Mapping[Spec, Path],
        calibration: Calibration | None,
    ) -> dict[Spec, Converted | Exception]:
        """``Producer.convert`` for each spec, into its directory. Where one fails, its error is
        returned in its place, the caller removes what it wrote, and the others go on."""
        ...
