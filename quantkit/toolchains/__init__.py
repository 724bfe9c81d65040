"""Isolated, pinned installations of what does not fit into quantkit's own environment.

A toolchain is a virtual environment that is built in a directory of its own, checked by importing
the engine, and only then named by a record (``toolchains/vllm.json``) in one rename: it is
installed or it is not, and an installation that fails leaves the one before it in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel, ConfigDict, ValidationError

from quantkit.errors import ToolchainError, did_you_mean
from quantkit.system import extras
from quantkit.system.files import write_json
from quantkit.system.home import home
from quantkit.system.machine import gpu
from quantkit.system.progress import say
from quantkit.toolchains import llama_cpp_source, own
from quantkit.toolchains.recipes import CONVERTER, PURPOSES, RECIPES, Device, Recipe

_SECONDS_BETWEEN_LINES = 10.0

Step = Callable[..., list[str]]
"""Runs a command line to its end; see ``_stream``."""


class Toolchain(BaseModel):
    """An installation that was built and checked, as its record says; or the user's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    version: str
    device: Device
    directory: Path
    pip: tuple[tuple[str, ...], ...]
    """The calls of pip that made it; none where the user did."""
    packages: dict[str, str]
    entry: str = "bin/python"
    """The file in it that is run."""

    @property
    def python(self) -> Path:
        """The interpreter that runs it: ``python -m …``."""
        return self.directory / self.entry


@dataclass(frozen=True)
class ToolchainStatus:
    """A line of ``quantkit engines list``; ``version`` is None where it is not installed, ``own``
    says that the program is the user's."""

    name: str
    version: str | None
    path: Path | None
    purpose: str
    install: str
    """What to do to get it."""
    own: bool = False


def listing() -> list[ToolchainStatus]:
    """Every engine: what is installed, where, what it is for, and how to get it."""
    from quantkit.toolchains.llama_programs import HOW_TO_GET, find_llama_server

    server: Path | None = None
    with contextlib.suppress(ToolchainError):
        server = find_llama_server().path
    rows = [
        ToolchainStatus(
            "transformers", _distribution("transformers"), Path(sys.prefix),
            PURPOSES["transformers"], "comes with quantkit",
        ),
        ToolchainStatus(
            "llamacpp", llama_cpp_source.library_version(), server, PURPOSES["llamacpp"],
            HOW_TO_GET, own=server is not None and server == own.named("llamacpp"),
        ),
    ]  # fmt: skip
    for name in RECIPES:
        found: Toolchain | None = None
        with contextlib.suppress(ToolchainError):
            found = find(name)
        rows.append(
            ToolchainStatus(
                name,
                found.version if found else None,
                found.directory if found else None,
                PURPOSES[name],
                f"quantkit engines install {name}",
                own=found is not None and own.named(name) == found.python,
            )
        )
    return rows


def find(name: str) -> Toolchain:
    """The user's own, what came with llama-cpp-python, or the installed toolchain; raise
    ToolchainError with the command that installs it, or where the user's does not run."""
    found = _of_the_user(name) or _built_in(name) or _installed(name)
    if found is None:
        raise ToolchainError(f"{name}: not installed; run: quantkit engines install {name}")
    return found


def install(name: str, force: bool = False, device: Device | None = None) -> Toolchain:
    """Build the toolchain, or return it where what is pinned is installed already, or the user has
    named one of his own.

    ``device``: what it is to compute on; the GPU, where there is one, if None. ``force`` builds it
    anew, and takes it from then on. Raise ToolchainError with pip's reason and where its log is;
    an older installation then stays as it was.
    """
    recipe = _recipe(name, device)
    if not force and (theirs := _of_the_user(name)):
        say(f"{name}: {theirs.version} is yours, {theirs.python}; --force installs another")
        return theirs
    if not force and (built := _built_in(name)):
        say(f"{name}: {built.version} came with llama-cpp-python, in {built.directory}")
        return built
    with _locked(name):
        before = _installed(name)
        if before and before.pip == recipe.pip and not force:
            say(f"{name}: {before.version} is installed in {before.directory}")
            return before
        _remove_all_but(name, before)
        directory = _root() / name / secrets.token_hex(4)
        log = home() / "logs" / f"install-{name}.log"
        try:
            toolchain = _build(name, recipe, directory, log)
            write_json(_record(name), toolchain.model_dump(mode="json"))
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        _remove_all_but(name, toolchain)
        own.forget(name)
    say(f"{name}: {toolchain.version} is installed in {directory}")
    return toolchain


def remove(name: str) -> None:
    """Forget the user's own program, or else delete the toolchain; raise ToolchainError where
    there is neither."""
    if forgotten := own.forget(name):
        say(f"{name}: {forgotten.program} is no longer used; it is left as it is")
        return
    _recipe(name)
    with _locked(name):
        if _installed(name) is None and not (_root() / name).is_dir():
            raise ToolchainError(f"{name}: not installed, so there is nothing to remove")
        _record(name).unlink(missing_ok=True)
        shutil.rmtree(_root() / name, ignore_errors=True)


def _build(name: str, recipe: Recipe, directory: Path, log: Path) -> Toolchain:
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"{name} ({recipe.device}): installing into {directory}; pip's output is in {log}")
    with log.open("w", encoding="utf-8") as file:

        def step(*argv: str) -> list[str]:
            return _stream(name, argv, file.fileno(), log)

        build = _unpacked if recipe.files else _environment
        return build(name, recipe, directory, step)


def _environment(name: str, recipe: Recipe, directory: Path, step: Step) -> Toolchain:
    python = directory / "bin" / "python"
    step(sys.executable, "-I", "-m", "venv", str(directory))
    for verb, *arguments in recipe.pip:
        # Byte code of what is imported is written then: most of what is installed never is.
        lazily = ["--no-compile"] if verb == "install" else []
        step(str(python), "-I", "-m", "pip", "--no-input", verb, *lazily, *arguments)
    say(f"{name}: checking that it imports")
    versions = step(
        str(python), "-I", "-c", f"import {recipe.module} as m; print('version', m.__version__)"
    )
    frozen = step(str(python), "-I", "-m", "pip", "list", "--format=json")
    packages = json.loads(next(line for line in frozen if line.startswith("[")))
    return Toolchain(
        name=name,
        version=next(line.split()[1] for line in versions if line.startswith("version ")),
        device=recipe.device,
        directory=directory,
        pip=recipe.pip,
        packages={package["name"]: package["version"] for package in packages},
    )


def _unpacked(name: str, recipe: Recipe, directory: Path, step: Step) -> Toolchain:
    library = llama_cpp_source.library_version()
    if library is None:
        raise extras.missing("llamacpp")
    with TemporaryDirectory(prefix="quantkit-") as work:
        for arguments in recipe.pip:
            step(sys.executable, "-I", "-m", "pip", "--no-input", *arguments, "--dest", work)
        llama_cpp_source.unpack(Path(work), directory, recipe.files)
    if not (directory / recipe.files[0]).is_file():
        raise ToolchainError(f"{name}: installation failed: no {recipe.files[0]} in what pip got")
    return Toolchain(
        name=name,
        version=library,
        device=recipe.device,
        directory=directory,
        pip=recipe.pip,
        packages={},
        entry=recipe.files[0],
    )


def _stream(name: str, argv: tuple[str, ...], log_descriptor: int, log: Path) -> list[str]:
    """Run a step to its end, its output to the log and now and then to the user.

    Returns the lines; raises ToolchainError with the last line that tells of an error.
    """
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_PROGRESS_BAR": "off"}
    lines: list[str] = []
    said = time.monotonic()
    with subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                os.write(log_descriptor, line.encode())
                lines.append(line.strip())
                warns = line.startswith("WARNING")
                if not warns and time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    say(f"{name}: {lines[-1][:100]}")
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        told = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
        raise ToolchainError(f"{name}: installation failed: {told[-1]}; see {log}")
    return lines


def _recipe(name: str, device: Device | None = None) -> Recipe:
    if name in RECIPES:
        return RECIPES[name][device or ("cuda" if gpu() else "cpu")]
    if name in PURPOSES:
        raise ToolchainError(
            f"{name}: is part of quantkit's own environment, not a toolchain; see `engines list`"
        )
    raise ToolchainError(
        f"{name}: unknown toolchain; there is {', '.join(RECIPES)}" + did_you_mean(name, RECIPES)
    )


def _of_the_user(name: str) -> Toolchain | None:
    """The program that the user named, as a toolchain that pip had no part in."""
    found = own.own(name) if name in RECIPES else None
    if found is None:
        return None
    return Toolchain.model_validate(
        {
            "name": name,
            "version": found.version,
            "device": found.device,
            "directory": found.program.parent.parent,
            "pip": (),
            "packages": {},
            "entry": str(found.program),
        }
    )


def _built_in(name: str) -> Toolchain | None:
    """llama.cpp's converter, where ``make`` built the library: of the same commit."""
    directory = llama_cpp_source.built_in() if name == CONVERTER else None
    library = llama_cpp_source.library_version()
    if directory is None or library is None:
        return None
    return Toolchain(
        name=name,
        version=library,
        device="cpu",
        directory=directory,
        pip=(),
        packages={},
        entry=llama_cpp_source.CONVERTER,
    )


def _root() -> Path:
    return home() / "toolchains"


def _record(name: str) -> Path:
    return _root() / f"{name}.json"


def _installed(name: str) -> Toolchain | None:
    try:
        found = Toolchain.model_validate_json(_record(name).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return found if (found.directory / found.entry).exists() else None


def _remove_all_but(name: str, kept: Toolchain | None) -> None:
    """Delete what replaced or interrupted installations left."""
    for left in (_root() / name).glob("*"):
        if kept is None or left != kept.directory:
            shutil.rmtree(left, ignore_errors=True)


def _distribution(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """One installation or removal at a time; the lock goes with the process."""
    _root().mkdir(parents=True, exist_ok=True)
    with (_root() / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ToolchainError(
                f"{name}: another quantkit is installing or removing it; wait for it to end"
            ) from error
        yield
