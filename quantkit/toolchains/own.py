"""Engines that the user has already, which are used in the place of quantkit's own.

Named by ``quantkit engines use``, which checks them and keeps a record, or by an environment
variable, which is stronger.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from quantkit.errors import ToolchainError
from quantkit.system.files import write_json
from quantkit.system.home import home

VARIABLES = {"llamacpp": "QUANTKIT_LLAMA_SERVER", "vllm": "QUANTKIT_VLLM"}
"""What names the program of each engine: a llama-server, and the Python that imports vllm."""

_SECONDS = 300
"""The first import of vLLM on a slow disk."""
_VLLM = """
import json, vllm
from vllm.platforms import current_platform
print("vllm:", json.dumps([vllm.__version__, current_platform.device_type]))
"""
_TOLD = re.compile(r"^vllm: (\[.+\])$", re.MULTILINE)
_VERSION = re.compile(r"^version: (.+)$", re.MULTILINE)
_FIRST_DEVICE = re.compile(r"^  ([A-Za-z]+)\d*: ", re.MULTILINE)
_DEVICES = {"CUDA": "cuda", "Metal": "metal", "MTL": "metal"}


class OwnEngine(BaseModel):
    """A program of the user's, and what it said of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    program: Path
    version: str
    device: str
    """What it computes on: ``cpu``, ``cuda``, ``metal``, or as llama.cpp calls it."""


def use(name: str, program: Path) -> OwnEngine:
    """Ask the program what it is, and take it from now on.

    Raise ToolchainError where it is not that engine, or does not run.
    """
    if name not in VARIABLES:
        raise ToolchainError(f"{name}: `engines use` takes {' or '.join(sorted(VARIABLES))}")
    found = _ASK[name](_runnable(program, "engines use"))
    _record(name).parent.mkdir(parents=True, exist_ok=True)
    write_json(_record(name), found.model_dump(mode="json"))
    return found


def named(name: str) -> Path | None:
    """The program that the environment variable or else the record names; None where none does.

    Raise ToolchainError where it cannot be run, so that no other is taken in its place.
    """
    variable = VARIABLES.get(name, "")
    if given := os.environ.get(variable):
        return _runnable(Path(given), variable)
    found = _recorded(name)
    if found is None:
        return None
    return _runnable(found.program, f"{name}, named by `engines use` (`engines remove` forgets it)")


def is_named(name: str) -> bool:
    """Whether the user names a program, be it there or not."""
    return bool(os.environ.get(VARIABLES.get(name, ""))) or _recorded(name) is not None


def own(name: str) -> OwnEngine | None:
    """The engine that ``named`` names, and what it says of itself.

    Raise ToolchainError where that is not such an engine.
    """
    program = named(name)
    if program is None:
        return None
    found = _recorded(name)
    return found if found and found.program == program else _ASK[name](program)


def forget(name: str) -> OwnEngine | None:
    """Take the program no longer; return what was taken so far."""
    found = _recorded(name)
    _record(name).unlink(missing_ok=True)
    return found


@cache
def _ask_vllm(python: Path) -> OwnEngine:
    told = _TOLD.search(_output("vllm", python, "-I", "-c", _VLLM))
    if told is None:
        raise ToolchainError(f"vllm: {python}: does not say vLLM's version, as its Python does")
    version, device = json.loads(told.group(1))
    if device not in ("cpu", "cuda"):
        raise ToolchainError(f"vllm: {python}: computes on {device}; quantkit runs cpu and cuda")
    return OwnEngine(name="vllm", program=python, version=version, device=device)


def ask_llama_server(program: Path, env: Mapping[str, str]) -> OwnEngine:
    """What a llama-server says of itself; ``env`` is added to the environment.

    Raise ToolchainError where it does not run, or is another program.
    """
    version = _VERSION.search(_output("llamacpp", program, "--version", env=env))
    if version is None:
        raise ToolchainError(f"llamacpp: {program}: does not say a version, as llama-server does")
    device = _FIRST_DEVICE.search(_output("llamacpp", program, "--list-devices", env=env))
    return OwnEngine(
        name="llamacpp",
        program=program,
        version=version.group(1),
        device=_DEVICES.get(device.group(1), device.group(1).lower()) if device else "cpu",
    )


@cache
def _ask_llama_server(program: Path) -> OwnEngine:
    return ask_llama_server(program, {})


_ASK: dict[str, Callable[[Path], OwnEngine]] = {
    "llamacpp": _ask_llama_server,
    "vllm": _ask_vllm,
}


def _output(name: str, *argv: str | Path, env: Mapping[str, str] | None = None) -> str:
    """What the program writes; raise ToolchainError with the last line where it fails."""
    try:
        ended = subprocess.run(
            argv,
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{name}: {argv[0]}: does not run: {error}") from error
    if ended.returncode != 0:
        said = ended.stdout.strip().splitlines() or [f"exit code {ended.returncode}"]
        raise ToolchainError(f"{name}: {argv[0]}: does not run: {said[-1]}")
    return ended.stdout


def _runnable(program: Path, where: str) -> Path:
    """Absolute, but not resolved: the Python of a virtual environment is a link."""
    path = program.expanduser().absolute()
    if not os.access(path, os.X_OK) or path.is_dir():
        raise ToolchainError(f"{where}: {path}: not a program that can be run")
    return path


def _record(name: str) -> Path:
    return home() / "toolchains" / f"{name}.own.json"


def _recorded(name: str) -> OwnEngine | None:
    try:
        return OwnEngine.model_validate_json(_record(name).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
