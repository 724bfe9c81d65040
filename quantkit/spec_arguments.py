"""Specs as the command line gives them: ``--to``, and options that hold for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from quantkit.errors import RecipeError
from quantkit.spec import Spec


def with_gguf_options(specs: Sequence[Spec], gguf: Mapping[str, Any]) -> list[Spec]:
    """The GGUF among them with these options, of which None and () were not given."""
    given = {key: value for key, value in gguf.items() if value not in (None, ())}
    if "tensor_types" in given:
        given["tensor_types"] = [pair.partition("=")[::2] for pair in given["tensor_types"]]
    if given.get("imatrix") == "auto":
        given["imatrix"] = True
    if given and all(spec.format != "gguf" for spec in specs):
        flag = f"--{next(iter(given)).replace('_', '-')}"
        raise RecipeError(f"{flag}: only gguf takes it, and no --to asks for gguf")
    return [spec.having(given) if spec.format == "gguf" else spec for spec in specs]


def by_producer(
    specs: Sequence[Spec], producer: str | None, producer_args: Sequence[str]
) -> list[Spec]:
    """All but GGUF made by ``producer``, with its options ``NAME=VALUE``, the values YAML."""
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
    return [spec if spec.format == "gguf" else spec.by(producer).having(options) for spec in specs]
