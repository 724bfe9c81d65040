"""Which type each tensor gets: asked of llama.cpp's own quantizer, which makes a dry run."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from quantkit.errors import ConversionError
from quantkit.formats.gguf import ggml
from quantkit.formats.gguf.file_types import FILE_TYPES
from quantkit.producers.gguf.options import Options

_TENSOR = re.compile(
    r"\[ *\d+/ *\d+\] (?P<name>\S+) +- \[ *(?P<columns>\d+),[\d, ]+\], type = +(?P<source>\w+), "
    r"size = .*?MiB(?: -> .*?MiB \((?P<target>\w+)\))?\n"
)
_FALLBACK = re.compile(
    r"warning: (?P<name>\S+) +- ncols +(?P<columns>\d+) not divisible by +(?P<block>\d+) "
    r"\(required for type +(?P<wanted>\w+)\).*?-> falling back to +(?P<given>\w+)"
)
_OVERRIDE = re.compile(r"(\S+) +- applying manual override")
_ERROR = re.compile(r"failed to quantize: (.*)")

_SMALL = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS")
"""Mixes whose output layer is of Q5_K; it is of Q6_K in the others."""


@dataclass(frozen=True)
class Forecast:
    """What the quantizer would write: ``types`` by tensor, in the order of the file, and ``notes``
    on the types that it could not use because rows do not divide into their blocks."""

    types: dict[str, str]
    notes: tuple[str, ...]


def forecast(source: Path, scheme: str, options: Options) -> Forecast:
    """What ``llama-quantize`` would make of the file ``source``, whose data are not read.

    Raise ConversionError with llama.cpp's reason where it would not.
    """
    log: list[str] = []
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[scheme]
    params.dry_run = True
    params.pure = options.pure
    if options.output_type:
        params.output_tensor_type = ggml.types()[options.output_type].number
    if options.embedding_type:
        params.token_embedding_type = ggml.types()[options.embedding_type].number
    if options.tensor_types:
        params.tt_overrides = _overrides(options.tensor_types)
    if options.imatrix:
        params.imatrix = _any_matrix()  # that there is one changes the mix, not what is in it
    with _log_to(log):
        llama_cpp.llama_model_quantize(os.fsencode(source), b"never written", ctypes.byref(params))
    text = "".join(log)
    if failed := _ERROR.search(text):
        raise ConversionError(
            f"gguf: llama.cpp cannot quantize this to {scheme}: {failed[1].strip()}"
        )
    tensors = list(_TENSOR.finditer(text))
    types = {match["name"]: (match["target"] or match["source"]).upper() for match in tensors}
    fallbacks = [match.groupdict() for match in _FALLBACK.finditer(text)]
    named = {fallback["name"] for fallback in fallbacks} | set(_OVERRIDE.findall(text))
    if scheme not in ("Q8_0", "MXFP4_MOE") and not (options.pure or options.output_type):
        wanted = "Q5_K" if scheme in _SMALL else "Q6_K"
        fallbacks += [
            # The output layer's fallback, which the log does not mention.
            match.groupdict() | {"given": "Q8_0", "wanted": wanted, "block": "256"}
            for match in tensors
            if match["name"] in ("output.weight", "token_embd.weight")
            and types[match["name"]] == "Q8_0"
            and int(match["columns"]) % 256
            and match["name"] not in named
        ]
    return Forecast(types, _notes(fallbacks))


def _overrides(tensor_types: tuple[tuple[str, str], ...]) -> Any:
    pairs = [(pattern.encode(), ggml.types()[kind].number) for pattern, kind in tensor_types]
    pairs.append((None, llama_cpp.GGML_TYPE_COUNT))  # type: ignore[arg-type]
    return (llama_cpp.llama_model_tensor_override * len(pairs))(*pairs)


def _any_matrix() -> Any:
    one = (ctypes.c_float * 1)(1.0)
    return (llama_cpp.llama_model_imatrix_data * 2)((b"any", one, 1), (None, None, 0))


@contextmanager
def _log_to(log: list[str]) -> Iterator[None]:
    """Send llama.cpp's log, which is one for the whole process, to ``log``."""

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(_level: int, text: bytes, _data: Any) -> None:
        log.append(text.decode("utf-8", errors="replace"))

    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    llama_cpp.llama_log_set(collect, ctypes.c_void_p())
    try:
        yield
    finally:
        llama_cpp.llama_log_set(before, data)


def _notes(fallbacks: list[dict[str, str]]) -> tuple[str, ...]:
    """``blk.*.{attn_k,attn_q}.weight (60 tensors): Q5_0 instead of Q4_K, 576 columns do not …``."""
    groups: dict[tuple[str, str], list[str]] = {}
    for fallback in fallbacks:
        why = (
            f"{fallback['given'].upper()} instead of {fallback['wanted'].upper()}, "
            f"{fallback['columns']} columns do not divide by {fallback['block']}"
        )
        place, _, kind = fallback["name"].removesuffix(".weight").rpartition(".")
        groups.setdefault((why, "blk.*." if place else ""), []).append(kind)
    return tuple(
        f"{place}{_any_of(kinds)}.weight ({len(kinds)} tensor{'s'[: len(kinds) - 1]}): {why}"
        for (why, place), kinds in groups.items()
    )


def _any_of(kinds: list[str]) -> str:
    distinct = sorted(set(kinds))
    return distinct[0] if len(distinct) == 1 else f"{{{','.join(distinct)}}}"
