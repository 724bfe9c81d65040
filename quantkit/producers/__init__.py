"""Producers: who makes the weights of a format. Looked up by name, imported on first use.

``native`` is quantkit's own. The others are packages that run in toolchains of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit import registry

if TYPE_CHECKING:
    from quantkit.models.spec import Spec
    from quantkit.producers.base import Producer


def load_producer(spec: Spec) -> Producer:
    """What makes ``spec``: quantkit itself, or the package that it names."""
    producer: Producer
    if spec.producer != registry.NATIVE:
        producer = registry.load("producer", spec.producer)
    else:
        producer = registry.instance(registry.MADE_HERE[spec.format])
    return producer
