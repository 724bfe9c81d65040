"""What the parts of a mixture of experts are called, in a block and in checkpoints."""

from __future__ import annotations

import re

_EXPERTS = ".experts."


def is_routed(linear: str) -> bool:
    """Whether a linear is an expert's: it sees the tokens that a router gives it, which may be
    none."""
    return _EXPERTS in linear


def expert_of(linear: str) -> str:
    """The name of the expert that a linear is of: ``mlp.experts.3``."""
    return linear.rpartition(".")[0]


def mixture_of(linear: str) -> str:
    """The name of all experts of a block, which engines run as one: ``mlp.experts``."""
    return linear.partition(_EXPERTS)[0] + _EXPERTS.removesuffix(".")


def every_expert(words: str) -> str:
    """With ``*`` for the numbers of experts: ``mlp.experts.*.up_proj``."""
    return re.sub(rf"(?<={re.escape(_EXPERTS)})\d+", "*", words)
