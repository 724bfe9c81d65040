"""``quantkit doctor``: what this machine can run, and what is missing."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
import cloup

from quantkit.cli import flags

if TYPE_CHECKING:
    from quantkit.doctor import Diagnosis


@cloup.command()
@flags.OUTPUT
def doctor(as_json: bool) -> None:
    """Check what this machine can run, and what is missing.

    Starts every engine once, which takes some seconds. The exit code is 0 if at least
    transformers, llama.cpp and llama-server run, else 1.

    Example:  quantkit doctor
    """
    from quantkit.cli.console import print_json
    from quantkit.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(_as_json(found))
    else:
        _show(found)
    if not found.ok:
        sys.exit(1)


def _as_json(found: Diagnosis) -> dict[str, Any]:
    from quantkit.doctor import features

    machine = asdict(found.machine)
    machine["cpu_flags"] = {flag: there for flag, there, _ in features(found.machine)}
    return {
        "ok": found.ok,
        "machine": machine,
        "engines": [asdict(engine) for engine in found.engines],
        "todo": [{"what": what, "command": command} for what, command in found.todo],
    }


def _show(found: Diagnosis) -> None:
    from quantkit.cli.console import print_table
    from quantkit.doctor import features

    machine = found.machine
    gigabytes = 1e9
    click.echo(
        f"machine  {machine.system} {machine.architecture}, Python {machine.python}\n"
        f"cpu      {machine.cpu}, {machine.cores} cores\n"
        f"memory   {machine.memory_bytes / gigabytes:.1f} GB, "
        f"{machine.memory_available_bytes / gigabytes:.1f} GB of it free\n"
        f"disk     {machine.disk_free_bytes / gigabytes:.1f} GB free in {machine.home}"
    )
    for gpu in machine.gpus:
        click.echo(
            f"gpu      {gpu.name}, {gpu.memory_bytes / gigabytes:.1f} GB, driver {gpu.driver}, "
            f"compute capability {gpu.compute_capability}"
        )
    if not machine.gpus:
        click.echo("gpu      Apple's" if machine.system == "Darwin" else "gpu      no NVIDIA GPU")
    click.echo()
    print_table(
        ["cpu feature", "here", "good for"],
        [[flag, "yes" if there else "no", use] for flag, there, use in features(machine)],
        numbers=False,
    )
    click.echo()
    print_table(
        ["engine", "runs", "version", "device", "notes"],
        [
            [
                engine.name,
                "yes" if engine.runs else "no",
                engine.version or "",
                engine.device or "",
                "; ".join(engine.notes),
            ]
            for engine in found.engines
        ],
        numbers=False,
    )
    if found.todo:
        click.echo()
        print_table(["missing or not as it could be", "command"], found.todo, numbers=False)
