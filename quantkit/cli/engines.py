"""``quantkit engines``: list, install, use and remove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import cloup

from quantkit.cli import flags

_NAME = cloup.argument(
    "name", help="Engine or producer, such as vllm or auto-round; see `quantkit engines list`."
)


@cloup.group()
def engines() -> None:
    """List, install, use or remove engines and producers.

    Each has an environment of its own. An engine that you have already can be used instead.
    """


@engines.command("list")
@flags.OUTPUT
def list_(as_json: bool) -> None:
    """Show which engines are there, and where.

    Example:  quantkit engines list
    """
    from quantkit import toolchains
    from quantkit.cli import show

    show.engines(toolchains.listing(), as_json)


@engines.command()
@_NAME
@cloup.option_group(
    "What",
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        help="Which build: for the CPU, or for an NVIDIA GPU.",
        show_default="cuda where there is such a GPU, else cpu",
    ),
)
@cloup.option_group(
    "Output",
    click.option(
        "--force",
        is_flag=True,
        help="Replace what is installed already, and any engine of your own.",
    ),
)
def install(name: str, device: Any, force: bool) -> None:
    """Install an engine or a producer.

    Example:  quantkit engines install vllm
    """
    from quantkit import toolchains

    toolchains.install(name, force=force, device=device)


@engines.command()
@cloup.argument("name", type=click.Choice(["llamacpp", "vllm"]), help="Which engine it is.")
@cloup.argument(
    "program",
    type=click.Path(path_type=Path),
    help="A Python that imports vllm, or a llama-server.",
)
def use(name: str, program: Path) -> None:
    """Use an engine that you have already.

    Starts it once, to check that it runs and to record its version. Give the command again
    after an update of the engine; `quantkit engines remove` stops using it.

    Example:  quantkit engines use vllm ~/vllm/bin/python

    Example:  quantkit engines use llamacpp /usr/local/bin/llama-server
    """
    from quantkit.toolchains import own

    found = own.use(name, program)
    click.echo(f"{name}: {found.version} on {found.device}, {found.program}")


@engines.command()
@_NAME
def remove(name: str) -> None:
    """Remove an installed engine, or stop using your own.

    Example:  quantkit engines remove vllm
    """
    from quantkit import toolchains

    toolchains.remove(name)
