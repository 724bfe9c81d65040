"""llama.cpp's own quantizer, in this process: the same files as ``llama-quantize`` writes."""

from __future__ import annotations

import ctypes
import os
import queue
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from quantkit.errors import ConversionError
from quantkit.formats.gguf.file_types import FILE_TYPES
from quantkit.progress import track

_BUFFER_BYTES = 1 << 30
"""What llama.cpp may hold of one tensor at once; its default is 8 GiB."""

_TENSOR = re.compile(
    r"\[ *\d+/ *\d+\] (?P<name>\S+) +- \[ *(?P<columns>\d+),[\d, ]+\], type = +(?P<source>\w+), "
    r"size = .*?MiB(?: -> .*?MiB \((?P<target>\w+)\))?\n"
)
_FALLBACK = re.compile(
    r"warning: (?P<name>\S+) +- ncols +(?P<columns>\d+) not divisible by +(?P<block>\d+) "
    r"\(required for type +(?P<wanted>\w+)\).*?-> falling back to +(?P<given>\w+)"
)
_ERROR = re.compile(r"failed to quantize: (.*)")


@dataclass(frozen=True)
class Forecast:
    """What the quantizer would write: ``types`` by tensor, and ``notes`` on the types that it
    could not use because rows do not divide into their blocks."""

    types: dict[str, str]
    notes: tuple[str, ...]


def forecast(source: Path, scheme: str) -> Forecast:
    """What quantizing ``source`` would give, by llama.cpp's dry run: reads no tensor data."""
    log: list[str] = []
    steps = _quantize(source, source.with_name("never-written.gguf"), scheme, log, dry_run=True)
    for _ in steps:
        pass
    text = "".join(log)
    tensors = list(_TENSOR.finditer(text))
    types = {match["name"]: (match["target"] or match["source"]).upper() for match in tensors}
    fallbacks = [match.groupdict() for match in _FALLBACK.finditer(text)]
    named = {fallback["name"] for fallback in fallbacks}
    fallbacks += [
        # The output layer's fallback, which the log does not mention.
        match.groupdict() | {"given": "Q8_0", "wanted": "Q6_K", "block": "256"}
        for match in tensors
        if match["name"] in ("output.weight", "token_embd.weight")
        and types[match["name"]] == "Q8_0" != scheme
        and match["name"] not in named
    ]
    return Forecast(types, _notes(fallbacks))


def quantize(source: Path, target: Path, scheme: str, tensors: int) -> None:
    """Quantize the GGUF ``source`` of so many tensors into ``target``, on all cores.

    Raise ConversionError with what llama.cpp said.
    """
    steps = _quantize(source, target, scheme, [], dry_run=False)
    for _ in track(steps, f"gguf: quantizing {scheme}", total=tensors):
        pass


def _quantize(
    source: Path, target: Path, scheme: str, log: list[str], *, dry_run: bool
) -> Iterator[None]:
    """Run the quantizer in a thread and yield once for each tensor that it starts on.

    In a thread, so that Ctrl-C is heard while llama.cpp works.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[scheme]
    params.nthread = os.cpu_count() or 1
    params.dry_run = dry_run
    params.max_buf_size = _BUFFER_BYTES
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def work() -> None:
        llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(params)
        )
        lines.put(None)

    with _log_to(lines):
        threading.Thread(target=work, name="llama-quantize", daemon=True).start()
        while (line := lines.get()) is not None:
            log.append(line)
            if re.match(r"\[ *\d+/", line):
                yield
    failed = _ERROR.search("".join(log))
    if failed:
        raise ConversionError(
            f"gguf: llama.cpp could not quantize to {scheme}: {failed[1].strip()}"
        )


@contextmanager
def _log_to(lines: queue.SimpleQueue[str | None]) -> Iterator[None]:
    """Send llama.cpp's log, which is one for the whole process, to ``lines``."""

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(_level: int, text: bytes, _data: Any) -> None:
        lines.put(text.decode("utf-8", errors="replace"))

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
