"""A job for AutoGPTQ where there is no CUDA: its script, with what asks for a GPU taken from it.

A script for the interpreter of its environment. Arguments: quantkit's script for AutoGPTQ, the job,
and where to write the result.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    import torch
    from auto_gptq.modeling import _base

    torch.cuda.is_available = lambda: True
    torch.cuda.empty_cache = torch.cuda.synchronize = lambda *_: None
    _base.CUDA_0 = _base.CPU
    script, job, result = sys.argv[1:]
    made = runpy.run_path(script)["make"](json.loads(Path(job).read_text()))
    Path(result).write_text(json.dumps(made))


if __name__ == "__main__":
    main()
