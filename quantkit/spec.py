"""Specs: ``format:scheme``, the short name of one variant to make."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantkit.errors import RecipeError, did_you_mean
from quantkit.formats import FORMATS


@dataclass(frozen=True, order=True)
class Spec:
    """What to make: ``gguf:Q4_K_M``, ``gptq:w4g64``, ``awq:w4g128``.

    ``scheme`` is a GGUF type verbatim, or bits and group size (``g-1``: one group a row).
    Whether the format knows the scheme is the format's own question (``Format.plan``).
    """

    format: str
    scheme: str

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Raise RecipeError unless ``text`` is ``format:scheme`` with a known format."""
        format_, colon, scheme = text.strip().partition(":")
        if not colon or not scheme:
            raise RecipeError(
                f"spec {text!r}: expected format:scheme, for example gguf:Q4_K_M, gptq:w4g64"
            )
        if format_ not in FORMATS:
            raise RecipeError(
                f"spec {text!r}: unknown format {format_!r}; formats are {', '.join(FORMATS)}"
                + did_you_mean(format_, FORMATS)
            )
        return cls(format_, scheme)

    @property
    def directory(self) -> str:
        """Name of the variant's directory, and its id in a ledger: ``gguf-Q4_K_M``."""
        return f"{self.format}-{self.scheme}"

    def __str__(self) -> str:
        return f"{self.format}:{self.scheme}"


@dataclass(frozen=True)
class GroupScheme:
    """Integer weights that share a scale per group of input channels: ``w4g64``."""

    bits: int
    group_size: int

    @classmethod
    def parse(cls, spec: Spec, bits: tuple[int, ...], group_sizes: tuple[int, ...]) -> GroupScheme:
        """Raise RecipeError unless the scheme is wBgG with bits and group size that are offered."""
        offered = [f"w{b}g{g}" for b in bits for g in group_sizes]
        match = re.fullmatch(r"w(\d+)g(-?\d+)", spec.scheme)
        if match is None or int(match[1]) not in bits or int(match[2]) not in group_sizes:
            raise RecipeError(
                f"spec {spec}: unknown scheme {spec.scheme!r}; {spec.format} takes "
                f"{', '.join(offered)}" + did_you_mean(spec.scheme, offered)
            )
        return cls(int(match[1]), int(match[2]))
