"""Build the wheel of llama-cpp-python: llama.cpp's library with those of its tools that are used,
and its converter.

Prints the wheel's path. One that this machine built before, of the same version in the same way,
is kept in quantkit's home and taken from there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from install.accelerator import cuda_compiler, nvidia_gpu
from quantkit.system.home import home

PACKAGE = "llama-cpp-python"
TOOLS = ("llama-server", "llama-quantize", "llama-imatrix", "llama-perplexity",
         "llama-gguf-split", "llama-bench")  # fmt: skip
"""The server, what computes importance matrices, and what the tests compare with."""
CONVERTER = "convert_hf_to_gguf.py"
"""llama.cpp's own converter, for the architectures that quantkit does not convert itself."""

_HERE = Path(__file__).parent
_CHOICE = _HERE / "llama_cpp.cmake"
_CONSTRAINTS = _HERE.parent / "constraints.txt"
_INCLUDE = "CMAKE_PROJECT_llama_cpp_INCLUDE"
_OPTIONS = {
    _INCLUDE: str(_CHOICE),
    "QUANTKIT_TOOLS": ";".join(TOOLS),
    "LLAVA_BUILD": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_TOOLS_INSTALL": "OFF",  # all of them; the included file installs those in TOOLS
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
_ACCELERATED = {"cpu": {}, "cuda": {"GGML_CUDA": "ON"}, "metal": {"GGML_METAL": "ON"}}


class BuildError(Exception):
    """Why there is no wheel, in one line."""


def options(accelerator: str) -> dict[str, str]:
    """CMake's options, by name."""
    return _OPTIONS | _ACCELERATED[accelerator]


def missing(wheel: Path, accelerator: str) -> list[str]:
    """What a wheel lacks of the programs and the backend that were asked for."""
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
    wanted = [*TOOLS, CONVERTER]
    if accelerator == "cuda":
        wanted.append("libggml-cuda.so")
    return [name for name in wanted if name not in names]


def pinned(constraints: str) -> str:
    """The version in the text of constraints.txt."""
    found = re.search(r"^llama[_-]cpp[_-]python==(\S+)$", constraints, re.MULTILINE)
    assert found is not None, "constraints.txt does not pin llama-cpp-python"
    return found.group(1)


def kept_in(version: str, accelerator: str) -> Path:
    """A directory for what is built of this version, in this way, for this processor."""
    choices = {name: value for name, value in options(accelerator).items() if name != _INCLUDE}
    made_of = [version, sorted(choices.items()), _CHOICE.read_text(), _processor(),
               os.environ.get("CMAKE_ARGS"), accelerator == "cuda" and cuda_compiler()]  # fmt: skip
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
    return home() / "wheels" / f"llama-cpp-python-{version}-{accelerator}-{digest}"


def build(version: str, accelerator: str, directory: Path) -> Path:
    """Have pip build the wheel into ``directory``; the compiler's output goes to a log.

    Raises BuildError where that fails.
    """
    words = [f"-D{name}={value}" for name, value in options(accelerator).items()]
    environment = dict(os.environ)
    given = environment.get("CMAKE_ARGS", "")
    environment["CMAKE_ARGS"] = " ".join([*map(shlex.quote, words), given]).strip()
    if accelerator == "cuda" and (compiler := cuda_compiler()):
        environment["CUDACXX"] = compiler
    # Without pip's cache: it would answer with what was built for other options.
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--no-binary",
               PACKAGE, "--verbose", f"{PACKAGE}=={version}"]  # fmt: skip
    directory.parent.mkdir(parents=True, exist_ok=True)
    log = home() / "logs" / "build-llama-cpp.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    _say(f"building for {accelerator} (once; 4 to 10 minutes on two cores); output: {log}")
    started = time.monotonic()
    with TemporaryDirectory(prefix="quantkit-", dir=directory.parent) as work:
        with log.open("w") as output:
            ended = subprocess.run(
                [*command, "--wheel-dir", work],
                env=environment, stdout=output, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        if ended.returncode != 0:
            raise BuildError(f"{_reason(log.read_text(errors='replace'))}; see {log}")
        (wheel,) = Path(work).glob("*.whl")
        if lacks := missing(wheel, accelerator):
            raise BuildError(f"{wheel.name} is without {', '.join(lacks)}; see {log}")
        if accelerator != "cuda" or nvidia_gpu():  # without a driver it cannot start
            start_server(wheel, Path(work))
        directory.mkdir(exist_ok=True)
        built = wheel.replace(directory / wheel.name)
    _say(f"built in {time.monotonic() - started:.0f} s")
    return built


def start_server(wheel: Path, work: Path) -> None:
    """Run ``llama-server --version`` out of the wheel, unpacked in ``work``: every library that it
    loads is there. Raises BuildError where it does not start."""
    shutil.unpack_archive(wheel, work, "zip")
    program = work / "bin" / "llama-server"
    program.chmod(0o755)
    environment = os.environ | {"LD_LIBRARY_PATH": str(work / "lib")}
    ended = subprocess.run(
        [program, "--version"], env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode != 0:
        raise BuildError(f"llama-server does not start: {_reason(ended.stderr)}")


def main(accelerator: str) -> int:
    """Print where the wheel is, built now or before."""
    version = pinned(_CONSTRAINTS.read_text())
    directory = kept_in(version, accelerator)
    wheels = sorted(directory.glob("*.whl"))
    if wheels:
        _say(f"{version} was built here before")
        print(wheels[0])
        return 0
    try:
        print(build(version, accelerator, directory))
    except BuildError as error:
        _say(f"the build failed: {error}")
        return 1
    return 0


def _reason(output: str) -> str:
    """The first line that tells of an error, or else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    told = [line for line in lines if re.search(r"\b(error|fatal):", line, re.IGNORECASE)]
    return (told or lines[-1:])[0][:200]


def _processor() -> str:
    """What the compiler is told of by -march=native: the kind of machine and its features."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", told, re.MULTILINE)
    return f"{platform.machine()} {flags.group(1) if flags else ''}"


def _say(line: str) -> None:
    print(f"llama.cpp: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
