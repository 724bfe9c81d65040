"""What each engine says when it is started here: its version, its device, or why it does not run.

Each is started in a process of its own: a library that was built for another processor ends the
process that loads it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

from quantkit import toolchains
from quantkit.errors import ToolchainError
from quantkit.toolchains import own
from quantkit.toolchains.llama_programs import find_llama_server

CORE = ("transformers", "llamacpp", "llama-server")
"""Without these, nothing is made and measured here."""

_SECONDS = 300
_TRANSFORMERS = """
import torch, transformers
found = "cuda" if torch.cuda.is_available() else "cpu"
print("device", "metal" if torch.backends.mps.is_available() else found)
"""
_LLAMA_CPP = """
import llama_cpp
print("device", "gpu" if llama_cpp.llama_supports_gpu_offload() else "cpu")
"""


@dataclass(frozen=True)
class Found:
    """An engine, as it answered; without a version it is not installed."""

    name: str
    version: str | None = None
    device: str | None = None
    error: str | None = None
    """Why it does not run, in one line; None where it does, or is not installed."""
    own: bool = False
    """Whether it is the user's."""


def ask_all() -> list[Found]:
    """Every engine, asked one after the other: some seconds each."""
    return [
        _in_this_environment("transformers", "transformers", _TRANSFORMERS),
        _in_this_environment("llamacpp", "llama-cpp-python", _LLAMA_CPP),
        _llama_server(),
        _vllm(),
    ]


def _in_this_environment(name: str, package: str, script: str) -> Found:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Found(name)
    told, error = _output(sys.executable, "-c", script)
    device = next((line.split()[1] for line in told if line.startswith("device ")), None)
    return Found(name, version, device, error)


def _llama_server() -> Found:
    name = "llama-server"
    try:
        yours = own.own("llamacpp")
        if yours:
            return Found(name, yours.version, yours.device, own=True)
        server = find_llama_server()
    except ToolchainError as error:
        named = own.is_named("llamacpp")
        return Found(name, "?", error=str(error), own=True) if named else Found(name)
    try:
        said = own.ask_llama_server(server.path, server.env)
    except ToolchainError as error:
        return Found(name, "?", error=str(error))
    return Found(name, said.version, said.device)


def _vllm() -> Found:
    named = own.is_named("vllm")
    try:
        found = toolchains.find("vllm")
    except ToolchainError as error:
        return Found("vllm", "?", error=str(error), own=True) if named else Found("vllm")
    if named:
        return Found("vllm", found.version, found.device, own=True)
    _, why = _output(str(found.python), "-I", "-c", "import vllm")
    return Found("vllm", found.version, found.device, why)


def _output(*command: str) -> tuple[list[str], str | None]:
    """The lines that a program prints, and why it failed."""
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], str(error)
    return ended.stdout.splitlines(), reason(ended.returncode, ended.stderr)


def reason(returncode: int, stderr: str) -> str | None:
    """Why a process failed: its last line, or the signal that ended it; None where it did not."""
    if returncode == 0:
        return None
    if returncode == -signal.SIGILL:
        return "it was built for another processor (illegal instruction)"
    if returncode < 0:
        return f"it is ended by {signal.Signals(-returncode).name}"
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {returncode}"
