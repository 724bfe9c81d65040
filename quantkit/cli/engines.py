"""``quantkit engines``: which are there, install and remove."""

from __future__ import annotations

import cloup

from quantkit.cli import flags

_NAME = cloup.argument(
    "name", help="Engine or producer, such as vllm or auto-round; see `quantkit engines list`."
)


@cloup.group()
def engines() -> None:
    """List, install or remove engines and producers.

    Each has an environment of its own.
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
@cloup.option_group("Output", flags.FORCE)
def install(name: str, force: bool) -> None:
    """Install an engine or a producer.

    Example:  quantkit engines install vllm
    """
    from quantkit import toolchains

    toolchains.install(name, force=force)


@engines.command()
@_NAME
def remove(name: str) -> None:
    """Remove an installed engine.

    Example:  quantkit engines remove vllm
    """
    from quantkit import toolchains

    toolchains.remove(name)
