"""An importance matrix by llama.cpp's own program, for models that quantkit does not convert."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from quantkit.errors import ConversionError
from quantkit.formats.gguf.imatrix import ImportanceMatrix
from quantkit.models.checkpoint import Checkpoint
from quantkit.system.home import home
from quantkit.system.progress import say
from quantkit.toolchains.llama_programs import find_llama_imatrix

if TYPE_CHECKING:
    from quantkit.data.calibration import Calibration

NOTE = "its importance matrix is computed by llama-imatrix, from the text of the calibration"
_LOG = "llama-imatrix.log"


def compute(checkpoint: Checkpoint, gguf: Path, calibration: Calibration) -> ImportanceMatrix:
    """What ``llama-imatrix`` counts while ``gguf``, the unquantized model, reads the calibration.

    It takes text and no ids: it is given that of the windows, one after the other, and cuts it into
    windows of the same length, each begun with a BOS where the model wants one. Raise
    ConversionError with its own reason, ToolchainError where there is no such program.
    """
    program = find_llama_imatrix()
    record = calibration.record
    length = record.sequence_length
    say(f"imatrix: llama-imatrix reads {record.samples} windows of {length} tokens")
    log = home() / "logs" / _LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="quantkit-") as work, log.open("w", encoding="utf-8") as output:
        text, written = Path(work) / "calibration.txt", Path(work) / "imatrix.gguf"
        text.write_text(_text(checkpoint, calibration), encoding="utf-8")
        command = [
            program.path, "-m", gguf, "-f", text, "-o", written, "--output-format", "gguf",
            "-c", length, "-b", length, "--chunks", record.samples, "--parse-special", "--no-ppl",
            "-ngl", 0 if calibration.device.type == "cpu" else 999,
        ]  # fmt: skip
        done = subprocess.run(
            list(map(str, command)),
            env=os.environ | program.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        if done.returncode != 0 or not written.is_file():
            raise ConversionError(
                f"imatrix: {checkpoint.id}: llama-imatrix failed: {_reason(log)}; its output is in "
                f"{log}"
            )
        found = ImportanceMatrix.read(written)
    return replace(found, datasets=record.datasets)


def _text(checkpoint: Checkpoint, calibration: Calibration) -> str:
    """The windows as text, and the first once more: read again, the others may be a token less."""
    ids = [*calibration.ids, calibration.ids[0]]
    tokenizer = checkpoint.tokenizer
    return "".join(tokenizer.decode(one, clean_up_tokenization_spaces=False) for one in ids)


def _reason(log: Path) -> str:
    """The last line that tells of an error, or else the last."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    told = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return (told or [line for line in lines if line] or ["no output"])[-1]
