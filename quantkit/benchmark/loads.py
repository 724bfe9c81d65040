"""What a load is: which requests, how they come, and for how long they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantkit.errors import RecipeError
from quantkit.ledger.load import Arrivals, Slo


@dataclass(frozen=True)
class Workload:
    """Synthetic prompts of ``prompt_tokens``, or the user's own; answers of a fixed length.

    ``longest``: tokens of the longest prompt.
    """

    prompt_tokens: int | None
    output_tokens: int
    longest: int
    texts: tuple[str, ...] = ()
    """The user's own prompts."""
    sha256: str | None = None
    """The hash of ``texts``."""

    @classmethod
    def synthetic(cls, prompt_tokens: int, output_tokens: int) -> Workload:
        """Synthetic text; no two prompts share their first words."""
        return cls(prompt_tokens, output_tokens, prompt_tokens)

    @property
    def context(self) -> int:
        """Tokens that a server must hold for each request, in whole blocks: a quarter more than
        the lengths, because a prompt is text, and text can come out a little longer."""
        return -(-max(self.longest + self.output_tokens, 128) * 5 // 4 // 64) * 64

    def check(self, most: int) -> None:
        """Raise RecipeError where a request would be longer than ``most`` tokens."""
        if self.longest + self.output_tokens > most:
            raise RecipeError(
                f"bench: a prompt of {self.longest} tokens and an answer of {self.output_tokens} "
                f"are more than the {most} that the model was made for; shorten one of them"
            )

    def protocol(self) -> dict[str, Any]:
        """What two results must have in common to be compared."""
        own = {"prompts": len(self.texts), "prompts_sha256": self.sha256} if self.texts else {}
        return {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens, **own}


@dataclass(frozen=True)
class Closed:
    """A fixed number of clients, each of which sends its next request when the last was
    answered."""

    concurrency: int

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}"

    def protocol(self) -> dict[str, Any]:
        """The load as a JSON value."""
        return {"concurrency": self.concurrency}


@dataclass(frozen=True)
class Open:
    """A rate of requests per second, sent whether or not earlier ones were answered."""

    rate_per_s: float
    arrivals: Arrivals

    def __str__(self) -> str:
        return f"{self.rate_per_s:.3g} requests/s ({self.arrivals})"

    def protocol(self) -> dict[str, Any]:
        """The load as a JSON value."""
        return {"rate_per_s": self.rate_per_s, "arrivals": self.arrivals}


Load = Closed | Open


@dataclass(frozen=True)
class Times:
    """Seconds of load before, during and after what is measured. Only an open loop goes on
    afterwards, at the same rate, until the requests of the window were answered or have missed the
    objective."""

    warmup: float
    window: float
    after: float = 0.0

    @property
    def total(self) -> float:
        """Seconds that requests are sent."""
        return self.warmup + self.window + self.after

    def longer(self, factor: float) -> Times:
        """Warm-up and window longer by this factor."""
        return Times(self.warmup * factor, self.window * factor, self.after)

    def of_window(self, seconds: float) -> Times:
        """With a window of ``seconds``, and the warm-up in proportion."""
        return self.longer(seconds / self.window)

    def of_total(self, seconds: float) -> Times:
        """Warm-up and window together of ``seconds``, in the same proportion."""
        return self.longer(seconds / (self.warmup + self.window))

    def open_loop(self, slo: Slo | None, output_tokens: int) -> Times:
        """With the time that the last request of the window may take: as long as the objective
        allows, where it limits both times; else as long as the window."""
        after = self.window
        if slo and slo.ttft_ms and slo.itl_ms:
            after = (slo.ttft_ms + slo.itl_ms * (output_tokens - 1)) / 1e3
        return Times(self.warmup, self.window, after)

    def protocol(self) -> dict[str, Any]:
        """Seconds as a JSON value."""
        return {"seconds": self.window, "warmup_seconds": self.warmup}
