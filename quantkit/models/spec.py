"""Specs: what one variant is to be; ``format:scheme`` in short."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.errors import RecipeError, did_you_mean
from quantkit.registry import FORMATS, NATIVE, SHORT, registered

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN = ("reference",)
"""Names that mean something else among the rows of a run."""


@dataclass(frozen=True)
class Spec:
    """What to make: ``gguf:Q4_K_M``, ``gptq:w4g64``, ``awq:w4g128``, with options and a name.

    ``scheme`` is a GGUF type verbatim, or bits and group size (``g-1``: one group a row).
    Whether the format knows the scheme and the options is its own question (``Format.plan``).
    """

    format: str
    scheme: str
    options: tuple[tuple[str, Hashable], ...] = ()
    """Keys and values, sorted by key; a mapping among the values is such pairs too, unsorted."""
    name: str | None = None
    """The variant's id and directory, where it is not to be ``directory``'s default."""
    producer: str = NATIVE
    """Who makes the weights: the format's own code, or a package in its toolchain."""

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

    @classmethod
    def of_entry(cls, entry: Any) -> Spec:
        """An entry of a recipe: ``gguf:Q4_K_M``, or a mapping of ``spec``, ``name`` and options.

        Raise RecipeError where it is neither.
        """
        if isinstance(entry, str):
            return cls.parse(entry)
        if not isinstance(entry, Mapping) or not isinstance(entry.get("spec"), str):
            raise RecipeError(
                "expected format:scheme, or keys and values with a `spec: format:scheme` among them"
            )
        own = ("spec", "name", "producer")
        options = {str(key): value for key, value in entry.items() if key not in own}
        name = entry.get("name")
        if name is not None:
            check_name(name)
        return cls.parse(entry["spec"]).by(entry.get("producer", NATIVE)).having(options, name)

    def by(self, producer: str) -> Spec:
        """The same, made by another producer; raise RecipeError where there is no such one."""
        known = (NATIVE, *registered("producer"))
        if producer not in known:
            raise RecipeError(
                f"spec {self}: unknown producer {producer!r}; producers are {', '.join(known)}"
                + did_you_mean(str(producer), known)
            )
        return replace(self, producer=producer)

    def having(self, options: Mapping[str, Any], name: str | None = None) -> Spec:
        """The same with these options and this name."""
        pairs = tuple(sorted((key, _frozen(value)) for key, value in options.items()))
        return replace(self, options=pairs, name=name)

    @property
    def directory(self) -> str:
        """Name of the variant's directory, and its id in a ledger: ``gguf-Q4_K_M``."""
        maker = "" if self.producer == NATIVE else f"-{self.producer}"
        return self.name or f"{SHORT.get(self.format, self.format)}-{self.scheme}{maker}"

    def known_options(self, known: Sequence[str]) -> dict[str, Any]:
        """The options by key; raise RecipeError for one that is not among ``known``."""
        for key, _ in self.options:
            if key not in known:
                takes = f"takes {', '.join(known)}" if known else "takes no options"
                maker = self.format if self.producer == NATIVE else self.producer
                raise RecipeError(
                    f"spec {self}: unknown option {key!r}; {maker} {takes}"
                    + did_you_mean(key, known)
                )
        return dict(self.options)

    def __str__(self) -> str:
        maker = "" if self.producer == NATIVE else f" by {self.producer}"
        return f"{self.format}:{self.scheme}{maker}"


def check_name(name: Any) -> None:
    """Raise RecipeError for what cannot be a variant's name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _TAKEN:
        raise RecipeError(
            f"name {name!r}: it becomes a directory: letters, digits, '.', '_' and '-', "
            f"and not {', '.join(_TAKEN)}"
        )


def _frozen(value: Any) -> Hashable:
    """A YAML value as one that can be a key."""
    if isinstance(value, Mapping):
        return tuple((str(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    found: Hashable = value
    return found


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

    def columns(self, in_features: int) -> int:
        """Input channels per group, of a linear with ``in_features``."""
        return in_features if self.group_size == -1 else self.group_size

    def __str__(self) -> str:
        return f"w{self.bits}g{self.group_size}"
