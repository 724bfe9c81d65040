"""llama.cpp's own converter, for the architectures that quantkit does not convert itself.

It runs in a process of its own (``converter_launcher.py``) and writes an unquantized GGUF; what is
made of that is made as of any other GGUF.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from quantkit import toolchains
from quantkit.errors import ConversionError, ToolchainError
from quantkit.formats.gguf import architectures
from quantkit.formats.gguf.chat import chat_fields, roles_in
from quantkit.formats.gguf.gguf_source import GGUFContent, GGUFSource
from quantkit.formats.packed import refuse_packed
from quantkit.models.chat_template import chat_templates
from quantkit.models.checkpoint import FORMAT, Checkpoint
from quantkit.models.end_tokens import end_ids
from quantkit.models.spec import Spec
from quantkit.producers.base import Converted
from quantkit.producers.gguf.checkpoint_content import model_name, own_type
from quantkit.producers.gguf.conversion import convert_many as convert_files
from quantkit.system.home import home
from quantkit.system.progress import say
from quantkit.toolchains.llama_cpp_source import CONVERTER

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration

_LAUNCHER = Path(__file__).with_name("converter_launcher.py")


@dataclass(frozen=True)
class Converter:
    """Where llama.cpp's converter is, and which one."""

    directory: Path
    version: str


def available() -> Converter | None:
    """The converter in ``$QUANTKIT_LLAMA_CPP``, a checkout of llama.cpp, or that of the toolchain.

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
        found = toolchains.find("llamacpp-converter")
    except ToolchainError:
        return None
    return Converter(found.directory, f"llama-cpp-python {found.version}")


def needed(checkpoint: Checkpoint) -> Converter | None:
    """The converter that is to convert ``checkpoint``; None where quantkit does it itself.

    Raise ConversionError, with what to do, where there is none.
    """
    if checkpoint.format != FORMAT or checkpoint.architecture in architectures.SUPPORTED:
        return None
    converter = available()
    if converter is None:
        architectures.architecture_of(checkpoint)  # refuses, and says how to get one
    refuse_packed("gguf", checkpoint)
    if checkpoint.quantized:
        raise ConversionError(
            f"gguf: {checkpoint.id} is a {checkpoint.architecture} that is quantized already "
            f"({checkpoint.quantized}); llama.cpp's own converter reads files, which quantkit does "
            "not decode for it: convert the unquantized weights"
        )
    return converter


def options(checkpoint: Checkpoint) -> dict[str, str]:
    """What is said of the converter among the resolved options."""
    converter = needed(checkpoint)
    return {"converter": f"llama.cpp ({converter.version})"} if converter else {}


def content(checkpoint: Checkpoint, converter: Converter) -> GGUFContent:
    """What the converter will write, but for the tensors' data: to plan with."""
    with TemporaryDirectory(prefix="quantkit-") as work:
        path = _convert(checkpoint, converter, Path(work), "head")
        found = GGUFContent(_source(checkpoint, path))
    found.notes = (
        f"{checkpoint.architecture} is converted by llama.cpp's own converter "
        f"({converter.version}), whose work quantkit does not check",
        *found.notes,
    )
    return found


def unquantized(checkpoint: Checkpoint, converter: Converter, directory: Path) -> Path:
    """Convert into a GGUF in ``directory``, of the type that holds every weight exactly.

    Raise ConversionError with the converter's own reason and where its output is.
    """
    say(f"gguf: {checkpoint.architecture}: converting with llama.cpp's own converter")
    return _convert(checkpoint, converter, directory, "whole")


def convert_many(
    checkpoint: Checkpoint,
    converter: Converter,
    targets: Mapping[Spec, Path],
    calibration: Calibration | None,
) -> dict[Spec, Converted | Exception]:
    """As ``conversion.convert_many``, from an unquantized GGUF that is deleted at the end."""
    with TemporaryDirectory(prefix=".unquantized-", dir=next(iter(targets.values()))) as work:
        path = unquantized(checkpoint, converter, Path(work))
        source = _source(checkpoint, path)
        made = convert_files(source, GGUFContent(source), targets, calibration)
    stored = source.parameters / checkpoint.parameters
    return {
        spec: replace(
            result,
            bits_per_weight=result.bits_per_weight * stored,
            tools=result.tools | {CONVERTER: converter.version},
        )
        if isinstance(result, Converted)
        else result
        for spec, result in made.items()
    }


def _source(checkpoint: Checkpoint, path: Path) -> GGUFSource:
    """What the converter wrote, but for chats: it takes an older template for the one that counts,
    and leaves out ends."""
    source = GGUFSource.of_file(path, allow_requantize=False)
    tokens, roles = source.file.array("tokenizer.ggml.tokens"), roles_in(source.file.metadata)
    ends = [end for end in end_ids(checkpoint.path, roles.get("eos")) if end < len(tokens)]
    templates = chat_templates(checkpoint.path)
    return replace(source, chat=chat_fields(templates, ends, roles, tokens.__getitem__))


def _convert(
    checkpoint: Checkpoint, converter: Converter, directory: Path, extent: Literal["head", "whole"]
) -> Path:
    scheme, name = own_type(checkpoint), model_name(checkpoint)
    if extent == "whole":
        _check_space(directory, checkpoint.parameters * (4 if scheme == "F32" else 2))
    written = directory / "unquantized.gguf"
    command: list[str | Path] = [sys.executable, "-P", _LAUNCHER, converter.directory, extent]
    command += [checkpoint.weights, "--outfile", written, "--outtype", scheme.lower()]
    if checkpoint.revision:  # a snapshot's directory is named after its commit
        command += ["--model-name", name]
    log = home() / "logs" / "llamacpp-converter.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = (converter.directory / "gguf-py", converter.directory)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        told = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        reason = told[-1].removeprefix("ERROR:hf-to-gguf:") if told else "no output"
        raise ConversionError(
            f"gguf: {checkpoint.id}: llama.cpp's own converter ({converter.version}) failed: "
            f"{reason.strip()}; its output is in {log}"
        )
    return written.rename(directory / f"{name}-{scheme}.gguf")


def _check_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        raise ConversionError(
            f"gguf: {directory} has {free / 1e9:.2f} GB free, and the unquantized GGUF on the way "
            f"takes {size / 1e9:.2f} GB; make room or choose another --out"
        )


def _commit(checkout: Path) -> str:
    """As git describes it (``b6300``), or the directory."""
    if (checkout / ".git").exists() and (git := shutil.which("git")):
        command = (git, "-C", checkout, "describe", "--tags", "--always", "--dirty")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return str(checkout)
