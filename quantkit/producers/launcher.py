"""Runs one producer's script on one job, in the producer's own environment.

A script for a process of its own, which imports nothing of quantkit: the standard library and what
the environment has. Arguments: the producer's script, the job file, and where to write the result.
The script's ``make(job)`` returns ``directory`` (where the checkpoint is), ``calibration`` (what
the package was given to look at, in words) and ``options`` (what it was run with).
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn


def main() -> None:
    """Raises what the package raises."""
    script, job, result = sys.argv[1:]
    refuse_code()
    made = runpy.run_path(script)["make"](json.loads(Path(job).read_text(encoding="utf-8")))
    Path(result).write_text(json.dumps(made), encoding="utf-8")


def refuse_code() -> None:
    """Neither a checkpoint's modules nor pickle, whatever the package asks for."""
    import torch
    from transformers import dynamic_module_utils

    dynamic_module_utils.get_cached_module_file = _refuse
    dynamic_module_utils.get_class_in_module = _refuse
    torch.load = _refuse


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("the checkpoint asks for code of its own to be run, or for a pickle")


if __name__ == "__main__":
    main()
