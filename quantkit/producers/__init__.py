"""Producers: who makes the weights of a format. Looked up by name, imported on first use.

``native`` is the format's own code. The others are packages that run in toolchains of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit import registry
from quantkit.formats import load_format

if TYPE_CHECKING:
    from quantkit.formats.base import Maker
    from quantkit.spec import Spec

NATIVE = "native"
PRODUCERS = {
    "auto-round": "quantkit.producers.packages:AutoRound",
    "autoawq": "quantkit.producers.packages:AutoAWQ",
    "auto-gptq": "quantkit.producers.packages:AutoGPTQ",
}


def load_maker(spec: Spec) -> Maker:
    """What makes ``spec``: its format, or the package that it names.

    Raise RecipeError, with the nearest name, where there is no such format or producer.
    """
    if spec.producer == NATIVE:
        return load_format(spec.format)
    package: Maker = registry.load("producer", spec.producer, PRODUCERS)
    return package
