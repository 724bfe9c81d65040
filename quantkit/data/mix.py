"""A mix of calibration texts by kind: what is in it, and how many samples each kind gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.data.text import MissingText, Text
from quantkit.data.texts import load_text
from quantkit.errors import RecipeError
from quantkit.system.progress import say


class Ingredient(BaseModel):
    """Where one kind of text comes from, and its part of the whole, against the other shares."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: str
    share: float = Field(gt=0, allow_inf_nan=False)


@dataclass(frozen=True)
class Part:
    """One kind of text in a mix; the shares of all parts add up to one."""

    kind: str
    share: Fraction
    text: Text


@dataclass(frozen=True)
class Mix:
    """Texts of several kinds, to be calibrated on together."""

    name: str
    parts: tuple[Part, ...]

    @property
    def texts(self) -> tuple[Text, ...]:
        """The texts of all parts."""
        return tuple(part.text for part in self.parts)


def _mix(**parts: tuple[str, float]) -> dict[str, Ingredient]:
    return {kind: Ingredient(text=text, share=share) for kind, (text, share) in parts.items()}


MIXES = {
    "mix": _mix(
        prose=("packages:prose", 0.13),
        web=("packages:web", 0.12),
        manual=("pydoc:calibration", 0.05),
        code=("stdlib:calibration", 0.2),
        chat=("packages:chat", 0.25),
        math=("packages:math", 0.125),
        languages=("packages:languages", 0.125),
    ),
    "mix:hub": _mix(
        web=("hub:web", 0.25),
        code=("hub:code", 0.2),
        chat=("hub:chat", 0.25),
        math=("hub:math", 0.1),
        languages=("hub:languages", 0.15),
        encyclopedia=("hub:encyclopedia", 0.05),
    ),
}
"""By name; the first needs no network."""


def parse_mix(entry: Mapping[str, Any]) -> dict[str, Ingredient]:
    """A mix as a recipe says it: ``{code: {text: ./src.txt, share: 0.3}, …}``.

    Raise RecipeError with the kind that is wrong.
    """
    if not entry:
        raise RecipeError("a mix needs at least one kind, such as code: {text: FILE, share: 0.3}")
    found = {}
    for kind, content in entry.items():
        try:
            found[str(kind)] = Ingredient.model_validate(content)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join([str(kind), *map(str, problem["loc"])])
            raise RecipeError(
                f"{where}: {problem['msg']}; expected {{text: NAME or FILE, share: 0.3}}"
            ) from error
    return found


def load_calibration(text: str | Mapping[str, Any]) -> Text | Mix:
    """Load what ``calibration.text`` says: a mix by its name or its kinds, else one text.

    Of a mix by name the kinds that are not installed are left out, and said. Raise RecipeError
    where there is no such text, or none is left.
    """
    if isinstance(text, str) and text not in MIXES:
        return load_text(text, others=MIXES)
    loaded: dict[str, Text] = {}
    ingredients = MIXES[text] if isinstance(text, str) else parse_mix(text)
    for kind, ingredient in ingredients.items():
        try:
            loaded[kind] = load_text(ingredient.text)
        except MissingText as error:
            if not isinstance(text, str):
                raise
            say(f"calibration: the mix has no {kind}; the other kinds give more: {error}")
    if not loaded:
        raise RecipeError(f"calibration text {text!r}: none of its kinds is installed; name a file")
    shares = {kind: Fraction(str(ingredients[kind].share)) for kind in loaded}
    whole = sum(shares.values())
    parts = [Part(kind, shares[kind] / whole, found) for kind, found in loaded.items()]
    return Mix(text if isinstance(text, str) else "own mix", tuple(parts))


def judges(text: Text | Mix) -> Mix | None:
    """Texts of all kinds to judge quantizers on that were calibrated on something else."""
    if isinstance(text, Mix) and text.name in MIXES:
        return None
    mix = load_calibration("mix")
    return mix if isinstance(mix, Mix) else None


def allot(shares: Sequence[Fraction], available: Sequence[int], samples: int) -> list[int]:
    """How many of ``samples`` each kind gives: by its share, and by the largest remainder.

    A kind with fewer than that gives all it has, and the others share the rest likewise. Raise
    ValueError where all together have fewer.
    """
    if sum(available) < samples:
        raise ValueError(f"{sum(available)} are fewer than {samples}")
    given = [0] * len(shares)
    open_, left = set(range(len(shares))), samples
    while open_:
        whole = sum(shares[i] for i in open_)
        exact = {i: left * shares[i] / whole for i in open_}
        short = [i for i in open_ if exact[i] > available[i]]
        if not short:
            break
        for i in short:
            given[i] = available[i]
            left -= available[i]
        open_ -= set(short)
    for i in open_:
        given[i] = int(exact[i])
    by_remainder = sorted(open_, key=lambda i: (given[i] - exact[i], -shares[i], i))
    for i in by_remainder[: samples - sum(given)]:
        given[i] += 1
    return given


def interleave(counts: Sequence[int]) -> list[int]:
    """The kinds' indices in an order in which each is spread evenly: ``counts[i]`` times ``i``."""
    places = [
        (Fraction(2 * k + 1, 2 * count), i) for i, count in enumerate(counts) for k in range(count)
    ]
    return [i for _, i in sorted(places)]
