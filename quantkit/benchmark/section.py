"""The section of a recipe that says which load variants are put under."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from quantkit.ledger.load import Arrivals, Slo
from quantkit.models.engine_config import EngineEntry
from quantkit.system.yaml_file import Section

WORKLOADS = {"chat": (512, 128), "summarize": (2048, 128), "long_output": (128, 512)}
"""Tokens of prompt and of output, by the workload's name."""


class BenchSection(Section):
    """The load: which requests, how many at a time or a second, for how long and how often."""

    engines: list[EngineEntry] = Field(default_factory=list)
    """Engines that serve each variant whose format they take, by a name or with options:
    ``{name: llamacpp, kv_cache: q8_0}``. If none does, the first engine that serves the format."""
    concurrency: list[Annotated[int, Field(ge=1)]] | Literal["auto"] = Field(
        default_factory=lambda: [1, 4]
    )
    """Requests at the same time; ``auto`` tries 1, 2, 4 … until throughput stops growing."""
    rates: list[Annotated[float, Field(gt=0)]] = Field(default_factory=list)
    """Requests per second, sent whether or not earlier ones are answered."""
    arrivals: Arrivals = "poisson"
    """How the requests of ``rates`` and ``slo`` arrive: at random times, or evenly."""
    slo: Slo | None = None
    """``{ttft_ms: 500, itl_ms: 50, share: 0.95}``: goodput is the highest rate that meets it."""
    workload: Literal["chat", "summarize", "long_output"] | None = None
    """Lengths of prompt and answer by name, in tokens: 512 and 128, 2048 and 128, 128 and 512."""
    prompt_tokens: int | None = Field(None, ge=1)
    """Length of each prompt, in tokens; null: that of ``workload``, or 128."""
    output_tokens: int | None = Field(None, ge=2)
    """Exact length of every answer, in tokens; null: that of ``workload``, or 32."""
    prompts: str | None = None
    """File of your own prompts, one JSON object a line as for ``evaluate.prompts``; null: synthetic
    ones."""
    prefix_cache: bool = False
    """Let engines reuse the prefixes that prompts have in common; false: each prompt is new to
    them."""
    seconds: float = Field(15.0, gt=0)
    """Length of each repetition, in seconds, after its warm-up."""
    repetitions: int = Field(3, ge=1)
    """How often each load is repeated; results are medians and carry their spread."""
    budget_seconds: float | None = Field(None, gt=0)
    """Time for all loads of one variant on one engine, in seconds: windows and repetitions are cut
    to fit, and the results say so; null: no limit."""
    price_per_hour: float | None = Field(None, gt=0)
    """Price of this machine per hour, in your currency: gives the cost per million tokens."""

    @model_validator(mode="after")
    def _one_workload(self) -> Self:
        lengths = self.prompt_tokens is not None or self.output_tokens is not None
        if self.workload and (lengths or self.prompts):
            raise ValueError("give either workload, or lengths or prompts of your own")
        if self.prompts and self.prompt_tokens is not None:
            raise ValueError("prompts have lengths of their own: leave prompt_tokens out")
        return self

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of each prompt (where they are synthetic) and of each output."""
        prompt, output = WORKLOADS[self.workload] if self.workload else (128, 32)
        return self.prompt_tokens or prompt, self.output_tokens or output
