"""llama.cpp's ``llama-perplexity``, whose numbers ours are held against: run, read, read its files.

Its file of base distributions (``--kl-divergence-base``): ``_logits_``, then int32: tokens of a
window, vocabulary, windows, the ids of all windows; then for each scored position float32 scale
and lowest log probability, and a uint16 for each token: log probability = scale x it + lowest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

PACKAGES = Path(sysconfig.get_path("purelib"))
PROGRAM = PACKAGES / "bin" / "llama-perplexity"
_LINE = re.compile(
    r"^(?:.*Final estimate: )?\s*(\S[^=]*?)\s*[:=]"
    r"\s*(-?[\d.]+)%?(?:\s*(?:±|\+/-)\s*([\d.]+))?[\s%]*$"
)
_LAST = re.compile(r"Final estimate: PPL = \d|Same top p: +\d.*%")
_ATTEMPTS = 5
QUANTILES = {
    "Minimum": 0.0, "0.1%": 0.001, "1.0%": 0.01, "5.0%": 0.05, "10.0%": 0.1, "25.0%": 0.25,
    "Median": 0.5, "75.0%": 0.75, "90.0%": 0.9, "95.0%": 0.95, "99.0%": 0.99, "99.9%": 0.999,
    "Maximum": 1.0,
}  # fmt: skip
"""As they are printed; the quartiles of Δp only."""


def run(*arguments: str | Path, context: int, windows: int | None = None) -> str:
    """What it prints; raise CalledProcessError where it fails.

    A thread of its own writes its log, and where the program ends first, which happens on busy
    cores, the last lines are lost: then it is run again.
    """
    settings = ["--ctx-size", context, "--chunks", windows or -1, "--threads", os.cpu_count()]
    for _ in range(_ATTEMPTS):
        done = subprocess.run(
            [PROGRAM, *map(str, settings), *arguments],
            env={**os.environ, "LD_LIBRARY_PATH": str(PACKAGES / "lib")},
            capture_output=True,
            text=True,
            check=True,
        )
        output = done.stdout + done.stderr
        if _LAST.search(output):
            return output
    raise RuntimeError(f"llama-perplexity printed no results in {_ATTEMPTS} runs: {output[-500:]}")


class Printed(NamedTuple):
    """A number and its standard error, where it is printed."""

    value: float
    stderr: float | None


def printed(output: str) -> dict[str, Printed]:
    """Every number of the final tables by the words before it: ``Mean KLD``, ``PPL``."""
    found = {}
    for line in output.splitlines():
        match = _LINE.search(line)
        if match is not None:
            name = " ".join(match[1].split())
            found[name] = Printed(float(match[2]), None if match[3] is None else float(match[3]))
    return found


@dataclass(frozen=True)
class Base:
    """A file of base distributions, read one window at a time."""

    path: Path
    ids: np.ndarray
    """``(windows, context) int32``, as tokenized: no BOS in the place of a window's first."""
    vocabulary: int

    @classmethod
    def open(cls, path: Path) -> Base:
        """Read what comes before the distributions."""
        with path.open("rb") as file:
            assert file.read(8) == b"_logits_"
            context, vocabulary, windows = np.fromfile(file, np.int32, 3).tolist()
            ids = np.fromfile(file, np.int32, windows * context).reshape(windows, context)
        return cls(path, ids, vocabulary)

    def log_probs(self) -> Iterator[torch.Tensor]:
        """Of each window's scored positions, ``(scored, vocabulary) float32``."""
        windows, context = self.ids.shape
        scored = context - 1 - context // 2
        row = np.dtype(
            [("scale", "<f4"), ("lowest", "<f4"), ("steps", "<u2", 2 * -(-self.vocabulary // 2))]
        )
        with self.path.open("rb") as file:
            file.seek(20 + self.ids.nbytes)
            for _ in range(windows):
                rows = np.fromfile(file, row, scored)
                steps = rows["steps"][:, : self.vocabulary].astype(np.float32)
                yield torch.from_numpy(rows["scale"][:, None] * steps + rows["lowest"][:, None])
