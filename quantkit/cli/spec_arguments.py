"""Specs as the command line gives them: ``--to``, and options that hold for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from quantkit import registry
from quantkit.errors import RecipeError
from quantkit.models.spec import Spec

if TYPE_CHECKING:
    from quantkit.producers.base import Producer


def specs_of(
    texts: Sequence[str],
    *,
    gguf: Mapping[str, Any],
    integers: Mapping[str, Any],
    compressed: Mapping[str, Any],
    producer: Mapping[str, Any],
) -> list[Spec]:
    """What every ``--to`` asks for. ``gguf``: options of all GGUF specs, ``producer``: who makes
    the others, ``integers`` and ``compressed``: what the native ones are told; None where not
    given."""
    parsed = [Spec.parse(text) for text in dict.fromkeys(texts)]
    told = with_integer_options(with_gguf_options(parsed, gguf), integers)
    return by_producer(_having(told, _given(compressed), ("compressed-tensors",)), **producer)


def with_gguf_options(specs: Sequence[Spec], gguf: Mapping[str, Any]) -> list[Spec]:
    """The specs, GGUF with these options; None and () stand for what was not given."""
    given = _given(gguf, "tensor_types")
    if given.get("imatrix") == "auto":
        given["imatrix"] = True
    return _having(specs, given, ("gguf",))


def with_integer_options(specs: Sequence[Spec], integers: Mapping[str, Any]) -> list[Spec]:
    """The specs, all but GGUF with these options; None and () stand for what was not given."""
    given = _given(integers, "overrides")
    return _having(specs, given, ("gptq", "awq", "compressed-tensors"))


def _given(options: Mapping[str, Any], pairs: str = "") -> dict[str, Any]:
    """What was given; under the key ``pairs`` are values of the form NAME=VALUE."""
    given = {key: value for key, value in options.items() if value not in (None, ())}
    if pairs in given:
        given[pairs] = [pair.partition("=")[::2] for pair in given[pairs]]
    return given


def _having(specs: Sequence[Spec], given: Mapping[str, Any], formats: Sequence[str]) -> list[Spec]:
    if given and all(spec.format not in formats for spec in specs):
        flag, takers = f"--{next(iter(given)).replace('_', '-')}", " or ".join(formats)
        raise RecipeError(f"{flag}: only {takers} takes it, and no --to asks for {takers}")
    return [
        spec.having({**dict(spec.options), **given}) if spec.format in formats else spec
        for spec in specs
    ]


def by_producer(
    specs: Sequence[Spec], producer: str | None, producer_args: Sequence[str]
) -> list[Spec]:
    """Those of formats that packages make made by ``producer``, with its options ``NAME=VALUE``,
    the values YAML; the others, GGUF for one, are quantkit's own."""
    if producer is None:
        if producer_args:
            raise RecipeError(f"--producer-arg {producer_args[0]}: name the --producer it is for")
        return list(specs)
    options = {}
    for argument in producer_args:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise RecipeError(f"--producer-arg {argument}: expected NAME=VALUE, such as iters=50")
        options[key] = yaml.safe_load(value)
    packages: list[Producer] = [
        registry.load("producer", n) for n in registry.registered("producer")
    ]
    formats = {name for package in packages for name in package.formats}
    return [
        spec.by(producer).having({**dict(spec.options), **options})
        if spec.format in formats
        else spec
        for spec in specs
    ]
