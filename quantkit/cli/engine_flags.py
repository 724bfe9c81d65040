"""Options of the engines, which ``bench``, ``evaluate`` and ``serve`` take alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from quantkit.cli.flags import Command, grouped

if TYPE_CHECKING:
    from quantkit.models.engine_config import Option


def engine_options(command: Command) -> Command:
    """What engines are given beside what quantkit says; ``asked`` makes one mapping of it."""
    return grouped(
        "engine_options",
        "Options of engines",
        command,
        click.option(
            "--engine-arg",
            "arguments",
            multiple=True,
            metavar="[ENGINE.]NAME[=VALUE]",
            help="An option of the engine's own command line, such as "
            "vllm.gpu-memory-utilization=0.4; where one engine runs, without its name. May be "
            "repeated.",
        ),
        click.option(
            "--tensor-parallel-size",
            type=click.IntRange(1),
            metavar="N",
            help="Number of GPUs among which vLLM divides each layer.",
            show_default="1",
        ),
        click.option(
            "--pipeline-parallel-size",
            type=click.IntRange(1),
            metavar="N",
            help="Number of GPUs, or of machines, among which vLLM divides the layers.",
            show_default="1",
        ),
    )


def asked(*, arguments: Sequence[str], **parallel: int | None) -> dict[str, Option]:
    """What was typed, by name: ``{"vllm.tensor_parallel_size": 2}``."""
    from quantkit.models.engine_config import options_of

    typed = {f"vllm.{name}": size for name, size in parallel.items() if size is not None}
    return {**options_of(arguments, "--engine-arg"), **typed}
