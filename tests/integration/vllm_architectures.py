"""Ask vLLM what it says of architectures, and write it down for quantkit.

``python -m tests.integration.vllm_architectures``, when another vLLM is pinned and installed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from quantkit import toolchains
from quantkit.engines.vllm import architectures

WRITTEN = Path(architectures.__file__).with_suffix(".json")
_SCRIPT = Path(__file__).with_name("vllm_registry.py")


def ask(out: Path) -> None:
    """Write to ``out`` what the installed vLLM says."""
    python = toolchains.find("vllm").python
    argv = [str(python), "-I", str(_SCRIPT), str(out)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    ask(WRITTEN)
