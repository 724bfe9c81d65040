"""What can be asked of GPTQ and AWQ besides bits and group size: how they round, which layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.decoder.expert_names import is_routed, mixture_of
from quantkit.engines.vllm.architectures import Fusion, Parts
from quantkit.errors import RecipeError
from quantkit.models.spec import GroupScheme, Spec

LEARNED, CLOSED_FORM = "learned", "closed-form"
ITERS = 100
"""Steps of learning a block by default."""


@dataclass(frozen=True)
class LinearOptions:
    """The options of one variant. Patterns are regular expressions, searched for in the names of
    linears (``model.layers.0.mlp.down_proj``)."""

    rounding: str = CLOSED_FORM
    """How weights are rounded; ``learned``: by gradient steps on the block's output."""
    iters: int = ITERS
    """Gradient steps per decoder block, where rounding is learned."""
    skip: tuple[str, ...] = ()
    """Linear layers to leave unquantized, by regular expressions that are searched for in names."""
    overrides: tuple[tuple[str, GroupScheme], ...] = ()
    """Another scheme for some linear layers, of GPTQ and compressed-tensors; the first pattern that
    is found decides."""

    @classmethod
    def of(
        cls,
        spec: Spec,
        parse: Callable[[Spec], GroupScheme] | None = None,
        *,
        others: tuple[str, ...] = (),
    ) -> LinearOptions:
        """Raise RecipeError for an unknown option or a value that does not fit.

        ``parse``: the scheme that some linears of a file may have instead, None where all have the
        same. ``others``: options that the producer reads itself.
        """
        keys = [*others, "rounding", "iters", "skip", *(["overrides"] if parse else [])]
        given = spec.known_options(keys)
        rounding, iters = given.get("rounding", CLOSED_FORM), given.get("iters", ITERS)
        if rounding not in (LEARNED, CLOSED_FORM):
            raise RecipeError(
                f"spec {spec}: rounding is {rounding!r}, expected {CLOSED_FORM} or {LEARNED}"
            )
        if "iters" in given and rounding != LEARNED:
            raise RecipeError(f"spec {spec}: iters is for rounding: {LEARNED}")
        if not isinstance(iters, int) or isinstance(iters, bool) or iters < 1:
            raise RecipeError(f"spec {spec}: iters is {iters!r}, expected a whole number above 0")
        overrides = given.get("overrides", ())
        if not isinstance(overrides, tuple) or not all(isinstance(o, tuple) for o in overrides):
            raise RecipeError(
                f"spec {spec}: overrides is {overrides!r}, expected patterns and schemes, such as "
                f"{{down_proj: {spec.scheme}}}"
            )
        return cls(
            rounding=rounding,
            iters=iters,
            skip=tuple(_pattern(spec, "skip", pattern) for pattern in _listed(given.get("skip"))),
            overrides=tuple(
                (
                    _pattern(spec, "overrides", pattern),
                    parse(Spec(spec.format, str(scheme))),
                )
                for pattern, scheme in overrides
                if parse
            ),
        )

    @property
    def steps(self) -> int:
        """Steps of learning a block; 0 where nothing is learned."""
        return self.iters if self.rounding == LEARNED else 0

    def schemes(
        self, spec: Spec, default: GroupScheme, linears: Iterable[str], parts: Parts
    ) -> dict[str, GroupScheme]:
        """Each linear that is quantized, by its name in the checkpoint, and its scheme.

        ``parts``: of linears that engines run as one. Raise RecipeError for a pattern that is found
        nowhere, for parts of such a linear that do not agree, and where nothing is left to
        quantize.
        """
        names = list(linears)
        for pattern in (*self.skip, *(pattern for pattern, _ in self.overrides)):
            if not any(re.search(pattern, name) for name in names):
                raise RecipeError(
                    f"spec {spec}: pattern {pattern!r} is found in no linear; they are named like "
                    f"{names[0]}"
                )
        found = {}
        for name in names:
            if not any(re.search(pattern, name) for pattern in self.skip):
                schemes = (s for pattern, s in self.overrides if re.search(pattern, name))
                found[name] = next(schemes, default)
        for fused in fused_linears(names, parts).values():
            if len({found.get(name) for name in fused}) > 1:
                said = ", ".join(f"{name}: {found.get(name, 'skipped')}" for name in fused[:6])
                said += ", …" * (len(fused) > 6)
                raise RecipeError(
                    f"spec {spec}: engines run these as one linear, so they need one scheme: {said}"
                )
        if not found:
            raise RecipeError(f"spec {spec}: skip leaves nothing to quantize")
        return found

    def resolved(self) -> dict[str, Any]:
        """Every option as it holds, for the manifest."""
        told: dict[str, Any] = {"rounding": self.rounding}
        if self.rounding == LEARNED:
            told["iters"] = self.iters
        if self.skip:
            told["skip"] = list(self.skip)
        if self.overrides:
            told["overrides"] = {pattern: str(scheme) for pattern, scheme in self.overrides}
        return told


def fused_linears(names: Iterable[str], parts: Parts) -> dict[str, list[str]]:
    """By the name of what engines run, the linears that it is made of; those alone are their own.

    ``….self_attn.qkv_proj``: ``….self_attn.q_proj`` and so on.
    """
    names = list(names)
    present = set(names)
    found: dict[str, list[str]] = {}
    for name in names:
        stem, dot, last = name.rpartition(".")

        def there(whole: str, before: str = stem + dot) -> int:
            return sum(before + part in present for part in parts[whole])

        wholes = [whole for whole, of in parts.items() if last in of]
        fused = stem + dot + max(wholes, key=there, default=last)
        found.setdefault(mixture_of(name) if is_routed(name) else fused, []).append(name)
    return found


def dynamic(
    default: GroupScheme,
    schemes: Mapping[str, GroupScheme],
    linears: Iterable[str],
    fusion: Fusion,
) -> dict[str, dict[str, int]]:
    """``dynamic`` of GPTQ's config, as GPTQModel and vLLM read it: what departs from the default.

    Keys are regular expressions that match whole names, after ``-:`` for a linear that is not
    quantized and ``+:`` for one with a scheme of its own. vLLM asks by the fused name, GPTQModel
    by those of the parts: each key takes both.
    """
    found: dict[str, dict[str, int]] = {}
    for fused, made_of in fused_linears(linears, fusion.parts).items():
        scheme = schemes.get(made_of[0])
        if scheme == default:
            continue
        whole = [fused, fusion.asked_as(fused)]
        parts = [*made_of, *map(fusion.asked_as, made_of)]
        names = "|".join(re.escape(name) for name in dict.fromkeys([*whole, *parts]))
        if is_routed(made_of[0]):
            names = "|".join(rf"{re.escape(name)}(?:\..+)?" for name in dict.fromkeys(whole))
        if scheme is None:
            found[f"-:^(?:{names})$"] = {}
        else:
            found[f"+:^(?:{names})$"] = {"bits": scheme.bits, "group_size": scheme.group_size}
    return found


def _listed(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _pattern(spec: Spec, key: str, pattern: Any) -> str:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise RecipeError(
            f"spec {spec}: {key} {pattern!r} is not a regular expression: {error}"
        ) from error
    return str(pattern)
