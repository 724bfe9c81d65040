"""llama.cpp's own converter, for the architectures that quantkit does not convert itself.

It writes an unquantized GGUF; what is made of that is made as of any other GGUF.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from quantkit.engines.llamacpp.loading import refusal
from quantkit.errors import ConversionError
from quantkit.formats.gguf import architectures
from quantkit.formats.gguf.chat import chat_fields, roles_in
from quantkit.formats.gguf.gguf_source import GGUFContent, GGUFSource
from quantkit.formats.packed import refuse_packed
from quantkit.models.chat_template import chat_templates
from quantkit.models.checkpoint import FORMAT, Checkpoint
from quantkit.models.end_tokens import end_ids
from quantkit.models.spec import Spec
from quantkit.producers.base import Converted
from quantkit.producers.gguf import llama_imatrix, pretokenizers
from quantkit.producers.gguf.checkpoint_content import model_name, own_type
from quantkit.producers.gguf.conversion import convert_many as convert_files
from quantkit.producers.gguf.importance import importance
from quantkit.producers.gguf.llama_cpp_converter import Converter, Extent, available
from quantkit.system.json_file import load_json
from quantkit.system.progress import say
from quantkit.toolchains.llama_cpp_source import CONVERTER

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration


def needed(checkpoint: Checkpoint) -> Converter | None:
    """The converter that is to convert ``checkpoint``; None where quantkit does it itself.

    Raise ConversionError, with what to do, where there is none.
    """
    if checkpoint.format != FORMAT or checkpoint.architecture in architectures.SUPPORTED:
        return None
    if not checkpoint.config.get("architectures"):
        raise ConversionError(
            f"gguf: {checkpoint.path / 'config.json'} names no architecture; add the model's own, "
            'such as "architectures": ["LlamaForCausalLM"]'
        )
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
    """The converter, as the resolved options record it."""
    converter = needed(checkpoint)
    return {"converter": f"llama.cpp ({converter.version})"} if converter else {}


def content(checkpoint: Checkpoint, converter: Converter) -> GGUFContent:
    """What the converter will write, but for the tensors' data: to plan with.

    Raise ConversionError where the converter or then llama.cpp refuses it.
    """
    with TemporaryDirectory(prefix="quantkit-") as work:
        path = _convert(checkpoint, converter, Path(work), "head")
        if told := refusal(path):
            raise ConversionError(
                f"gguf: {checkpoint.id}: llama.cpp's own converter ({converter.version}) takes it, "
                f"but llama.cpp does not load what that writes: {told}"
            )
        found = GGUFContent(_source(checkpoint, path))
    found.notes = (
        f"{checkpoint.architecture} is converted by llama.cpp's own converter "
        f"({converter.version}), whose tensors quantkit does not check",
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
        counted = partial(llama_imatrix.compute, checkpoint, path)
        matrix = partial(
            importance, checkpoint, compute=counted, by=f"llama.cpp {converter.version}"
        )
        made = convert_files(source, GGUFContent(source), targets, calibration, matrix)
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


def _convert(checkpoint: Checkpoint, converter: Converter, directory: Path, extent: Extent) -> Path:
    scheme, name = own_type(checkpoint), model_name(checkpoint)
    if extent == "whole":
        _check_space(directory, checkpoint.parameters * (4 if scheme == "F32" else 2))
    written = directory / "unquantized.gguf"
    arguments: list[str | Path] = [
        checkpoint.weights,
        "--outfile",
        written,
        "--outtype",
        scheme.lower(),
    ]
    if checkpoint.revision:  # a snapshot's directory is named after its commit
        arguments += ["--model-name", name]
    try:
        converter.run(arguments, extent, _pretokenizer(checkpoint))
    except ConversionError as error:
        raise ConversionError(f"gguf: {checkpoint.id}: {error}") from error
    return written.rename(directory / f"{name}-{scheme}.gguf")


def _pretokenizer(checkpoint: Checkpoint) -> str:
    """What ``detect`` finds in a byte-level tokenizer; empty where it is none, or finds nothing."""
    description = load_json(checkpoint.path / "tokenizer.json")
    if description.get("model", {}).get("type") != "BPE":
        return ""
    try:
        return pretokenizers.detect(checkpoint.tokenizer, description, checkpoint.path)
    except ConversionError:
        return ""


def _check_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < size:
        raise ConversionError(
            f"gguf: {directory} has {free / 1e9:.2f} GB free, and the unquantized GGUF on the way "
            f"takes {size / 1e9:.2f} GB; make room or choose another --out"
        )
