"""What a bench is asked to do, from a recipe's section or the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantkit.benchmark.loads import Times, Workload
from quantkit.benchmark.sweep import MOST_CONCURRENT
from quantkit.errors import RecipeError
from quantkit.ledger.load import Arrivals, Slo
from quantkit.models.tokenizer import load_tokenizer
from quantkit.models.variant import Model, tokenizer_directory
from quantkit.system.files import sha256_json

if TYPE_CHECKING:
    from quantkit.benchmark.section import BenchSection
    from quantkit.evaluation.prompt_file import Prompts

_WARMUP_SHARE = 4
_WARMUP_SECONDS = (1.0, 5.0)
"""The warm-up of each repetition is a quarter of what is measured, within these limits."""


@dataclass(frozen=True)
class BenchOptions:
    """Loads, one after the other, on one start of the server; ``repetitions`` of each."""

    workload: Workload
    concurrency: tuple[int, ...] | None = (1, 4)
    """None: 1, 2, 4 … until throughput stops growing."""
    rates: tuple[float, ...] = ()
    arrivals: Arrivals = "poisson"
    slo: Slo | None = None
    times: Times = field(default_factory=lambda: Times(2.0, 15.0))
    repetitions: int = 3
    budget_seconds: float | None = None
    """For all loads of one server; windows and repetitions are cut to fit. None: no limit."""
    prefix_cache: bool = False
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        levels = self.concurrency
        if levels is not None and (len(set(levels)) != len(levels) or min(levels, default=1) < 1):
            raise RecipeError(f"concurrency {list(levels)}: expected different numbers from 1 on")
        if levels == () and not self.rates and not self.slo:
            raise RecipeError("bench: nothing to do: give it concurrency, rates or an slo")
        if len(set(self.rates)) != len(self.rates):
            raise RecipeError(f"rates {list(self.rates)}: expected different numbers")

    @classmethod
    def of_section(cls, section: BenchSection, workload: Workload) -> BenchOptions:
        """The options that the recipe asks for, with its prompts already read."""
        shortest, longest = _WARMUP_SECONDS
        warmup = min(max(section.seconds / _WARMUP_SHARE, shortest), longest)
        levels = section.concurrency
        return cls(
            workload=workload,
            concurrency=None if levels == "auto" else tuple(levels),
            rates=tuple(section.rates),
            arrivals=section.arrivals,
            slo=section.slo,
            times=Times(warmup, section.seconds),
            repetitions=section.repetitions,
            budget_seconds=section.budget_seconds,
            prefix_cache=section.prefix_cache,
            price_per_hour=section.price_per_hour,
        )

    @property
    def slots(self) -> int:
        """Requests that the server must be able to run at the same time; without a fixed
        concurrency, as many as an automatic sweep may reach."""
        return max(self.concurrency or (MOST_CONCURRENT,))

    def key(self) -> dict[str, Any]:
        """All of it, as a JSON value."""
        return {
            **self.protocol(),
            "concurrency": self.concurrency,
            "rates": self.rates,
            "arrivals": self.arrivals,
            "price_per_hour": self.price_per_hour,
        }

    def protocol(self) -> dict[str, Any]:
        """What two results must have in common to be compared, but for the load itself."""
        return {
            **self.workload.protocol(),
            **self.times.protocol(),
            "repetitions": self.repetitions,
            "budget_seconds": self.budget_seconds,
            "slo": self.slo.model_dump(mode="json") if self.slo else None,
            "prefix_cache": self.prefix_cache,
            "slots": self.slots,
            "context": self.workload.context,
        }


def workload(section: BenchSection, model: Model, prompts: Prompts | None) -> Workload:
    """Made-up prompts or, where the section names a file, its ``prompts`` in tokens of ``model``.

    They are sent as text, a chat with its template, to which the server adds its own BOS.
    """
    prompt_tokens, output_tokens = section.lengths
    if prompts is None:
        return Workload.synthetic(prompt_tokens, output_tokens)
    tokenizer = load_tokenizer(tokenizer_directory(model))
    ids = [prompt.ids for prompt in prompts.entries]
    texts = [tokenizer.decode(one).removeprefix(tokenizer.bos_token or "") for one in ids]
    return Workload(None, output_tokens, max(map(len, ids)), tuple(texts), sha256_json(texts))
