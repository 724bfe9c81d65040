"""A producer's work in a process of its own: one small job file in, a checkpoint out."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from quantkit.engines.process import Process, last_words, launched
from quantkit.errors import ConversionError
from quantkit.system.home import home
from quantkit.system.progress import say

LAUNCHER = Path(__file__).with_name("launcher.py")
_SECONDS_BETWEEN_LINES = 30.0
_TAIL_BYTES = 4096
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Job(BaseModel):
    """What a producer's script is given, as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Path
    """A checkpoint's directory: config.json, tokenizer and safetensors."""
    format: str
    scheme: str
    """As the spec has it: ``w4g64``, or the name of one of compressed-tensors' presets."""
    bits: int
    group_size: int
    options: dict[str, Any]
    """The package's own, under its names."""
    ignore: list[str]
    """Modules to leave unquantized, by name, or by ``re:`` and a pattern that names match whole;
    empty for a package that is not told."""
    token_ids: Path
    """JSON: one list of ids for each calibration sample, all of one length; none where what is made
    depends on no text."""
    seed: int
    device: str
    output: Path
    """Where to write; does not exist yet."""


class _Result(BaseModel):
    """What the script says at the end; see ``launcher.py``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: Path
    calibration: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Done:
    """What a producer made: where it is, what it looked at, what it ran with."""

    directory: Path
    calibration: str
    options: dict[str, Any]
    peak_rss_bytes: int
    """The peak memory of the producer's processes together."""


def run(name: str, python: Path, script: Path, job: Job, what: str) -> Done:
    """Run ``script`` on ``job`` with the interpreter of its environment.

    ``what`` is made is said now and then with the last line of output. Raise ConversionError with
    the producer's own reason, and where its output is; nothing of it is left running.
    """
    work = job.output.parent
    order, result = work / "job.json", work / "result.json"
    order.write_text(job.model_dump_json(indent=2) + "\n", encoding="utf-8")
    log = home() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # -I: nothing of this process's directory or PYTHONPATH reaches into the environment.
    argv = [str(python), "-I", str(LAUNCHER), str(script), str(order), str(result)]
    say(f"{what}: {name} is at work; its output is in {log}")
    with launched(name, argv, _environment(job), log) as process, process.watch_memory() as memory:
        _wait(process, log, what)
        code = process.wait()
    if code != 0:
        raise ConversionError(
            f"{what}: {name} failed (exit code {code}): {last_words(log)}; its output is in {log}"
        )
    try:
        made = _Result.model_validate_json(result.read_bytes())
    except (OSError, ValidationError) as error:
        raise ConversionError(
            f"{what}: {name} ended without a result; its output is in {log}"
        ) from error
    return Done(made.directory, made.calibration, made.options, memory.peak_bytes)


def write_token_ids(path: Path, ids: list[list[int]]) -> None:
    """The calibration samples as the script reads them."""
    path.write_text(json.dumps(ids), encoding="utf-8")


def _environment(job: Job) -> dict[str, str]:
    """Beside this process's own: no network, and no GPU where the job is for the CPU."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return offline if job.device != "cpu" else offline | {"CUDA_VISIBLE_DEVICES": ""}


def _wait(process: Process, log: Path, what: str) -> None:
    said = time.monotonic()
    while process.exit_code is None:
        time.sleep(0.1)
        if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            say(f"{what}: {said - process.started:.0f} s: {_last_line(log)[:100]}")


def _last_line(log: Path) -> str:
    """What a progress bar shows at this moment, or the last line."""
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        text = _ESCAPES.sub("", file.read().decode(errors="replace"))
    return next((line.strip() for line in re.split(r"[\r\n]", text)[::-1] if line.strip()), "")
