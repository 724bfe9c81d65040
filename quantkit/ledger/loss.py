"""What a ledger says of where a variant's loss comes from, and of what the engines alone change."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from quantkit.models.engine_config import EngineConfig


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Entry):
    """A mean over windows of text, ± its standard error over the windows in pairs."""

    value: float
    stderr: float | None
    """None for a single window."""


class Loss(_Entry):
    """A variant's loss on its serving engine, in nats per token, split into what causes it.

    A loss is the mean negative log likelihood on one side minus that on the other, the logarithm
    of the ratio of perplexities; the parts add up to ``total``. What could not be measured is
    None, and ``notes`` say why; then ``total`` is the sum of the others.
    """

    conversion: Part | None
    """The unquantized GGUF in llama.cpp, against the source in the reference engine; only of
    GGUF."""
    quantization: Part | None
    """The variant's weights, unpacked, against the source's, both in the reference engine."""
    activations: Part | None = None
    """What rounding the inputs of linears adds, as the serving engine does it, computed in the
    reference engine; None where it does not."""
    engine: Part | None
    """All else: what the serving engine computes otherwise with these weights than the reference
    engine does, beyond ``conversion``."""
    total: Part
    kld: Part | None
    """Divergence of the variant on the serving engine, where that gives whole distributions."""
    kld_quantization: Part | None
    """Divergence of its unpacked weights in the reference engine, activations left alone."""
    windows: int
    reference_engine: EngineConfig
    serving_engine: EngineConfig | None
    """None where it was not measured."""
    protocol: dict[str, Any]
    notes: list[str] = Field(default_factory=list)


class NoiseFloor(_Entry):
    """The source itself on another engine, or in other batches, against the reference engine: a
    drift that no quantization caused, and below which a variant's says nothing of its weights."""

    engine: EngineConfig
    batch: int = 1
    """How many times as many windows were computed at once as in the reference; above 1 on the
    reference engine itself."""
    weights: str
    """What was run there: ``safetensors:bf16``, ``gguf:BF16``."""
    nll: Part
    """Nats per token, as ``Loss.total``."""
    kld: Part | None
    top1_agreement: Part | None
    """Over positions. Like ``kld`` None where the engine gives no whole distributions."""
    windows: int
    protocol: dict[str, Any]
