"""``quantkit engines``: which are there, install and remove."""

from __future__ import annotations

import click


@click.group()
def engines() -> None:
    """List, install or remove engines and producers, each in an environment of its own."""


@engines.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def list_(as_json: bool) -> None:
    """Say which engines are there, and where.

    Example:  quantkit engines list
    """
    from quantkit import toolchains
    from quantkit.cli import show

    show.engines(toolchains.listing(), as_json)


@engines.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Replace what exists.")
def install(name: str, force: bool) -> None:
    """Install an engine or a producer that needs an environment of its own.

    Example:  quantkit engines install vllm
    """
    from quantkit import toolchains

    toolchains.install(name, force=force)


@engines.command()
@click.argument("name")
def remove(name: str) -> None:
    """Remove an installed engine.

    Example:  quantkit engines remove vllm
    """
    from quantkit import toolchains

    toolchains.remove(name)
