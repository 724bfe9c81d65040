"""Find llama.cpp's own converter, and run it in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantkit import toolchains
from quantkit.errors import ConversionError, ToolchainError
from quantkit.system.home import home
from quantkit.toolchains import recipes
from quantkit.toolchains.llama_cpp_source import CONVERTER

Extent = Literal["head", "whole"]
"""``head``: all but the tensors' data, for which a hole is left."""

_LAUNCHER = Path(__file__).with_name("converter_launcher.py")
_LOGS = ("ERROR:hf-to-gguf:", "WARNING:hf-to-gguf:", "INFO:hf-to-gguf:")


@dataclass(frozen=True)
class Converter:
    """Where llama.cpp's converter is, and which one."""

    directory: Path
    version: str

    def run(self, arguments: Sequence[str | Path], extent: Extent, pretokenizer: str) -> None:
        """Convert as its own ``arguments`` say. ``pretokenizer``: llama.cpp's name for it where the
        converter does not know the vocabulary; may be empty.

        Raise ConversionError with the converter's own reason and where its output is.
        """
        command: list[str | Path] = [
            sys.executable,
            "-P",
            _LAUNCHER,
            self.directory,
            extent,
            pretokenizer,
        ]
        log = home() / "logs" / "llamacpp-converter.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = (self.directory / "gguf-py", self.directory)
        environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                [*command, *arguments],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        if done.returncode == 0:
            return
        told = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        reason = told[-1].strip() if told else "no output"
        for prefix in _LOGS:
            reason = reason.removeprefix(prefix)
        if done.returncode < 0:
            reason = f"it was killed by signal {-done.returncode}; is there memory enough?"
        raise ConversionError(
            f"llama.cpp's own converter ({self.version}) refused it: {reason}; its output is in "
            f"{log}"
        )


def available() -> Converter | None:
    """The converter in ``$QUANTKIT_LLAMA_CPP``, a checkout of llama.cpp, or the one that came with
    llama-cpp-python, or that of the toolchain.

    Raise ToolchainError where the variable names something else.
    """
    chosen = os.environ.get("QUANTKIT_LLAMA_CPP")
    if chosen:
        directory = Path(chosen).expanduser().absolute()
        if not (directory / CONVERTER).is_file():
            raise ToolchainError(
                f"QUANTKIT_LLAMA_CPP: {directory}: no {CONVERTER} there; name a checkout of "
                "llama.cpp, or unset it"
            )
        return Converter(directory, _commit(directory))
    try:
        found = toolchains.find(recipes.CONVERTER)
    except ToolchainError:
        return None
    return Converter(found.directory, f"llama-cpp-python {found.version}")


def _commit(checkout: Path) -> str:
    """As git describes it (``b6300``), or the directory."""
    if (checkout / ".git").exists() and (git := shutil.which("git")):
        command = (git, "-C", checkout, "describe", "--tags", "--always", "--dirty")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return str(checkout)
