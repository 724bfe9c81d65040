"""Which accelerator `make` builds for: cpu, cuda or metal.

Prints the word on stdout and the reason on stderr.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ACCELERATORS = ("cpu", "cuda", "metal")
_TOOLKIT = Path("/usr/local/cuda")
"""Where NVIDIA's installer puts the compiler, often not on PATH."""


def detect(system: str, gpu: str | None, compiler: str | None) -> tuple[str, str]:
    """The accelerator and the reason, of what ``platform.system()``, nvidia-smi and nvcc say."""
    if system == "Darwin":
        return "metal", "macOS"
    if gpu is None:
        return "cpu", "no NVIDIA GPU found"
    if compiler is None:
        return "cpu", (
            f"{gpu} found, but no CUDA compiler (nvcc); install the CUDA toolkit, "
            "then: make setup ACCEL=cuda"
        )
    return "cuda", f"{gpu}, {compiler}"


def nvidia_gpu() -> str | None:
    """The first GPU's name, as nvidia-smi says; None where it fails or names none."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return listed.stdout.strip().partition("\n")[0] or None


def cuda_compiler() -> str | None:
    """nvcc: $CUDACXX, on PATH, or of the toolkit in $CUDA_HOME or its usual place."""
    toolkit = Path(os.environ.get("CUDA_HOME") or _TOOLKIT)
    found = os.environ.get("CUDACXX") or "nvcc"
    return shutil.which(found) or shutil.which(toolkit / "bin" / "nvcc")


def main(asked: str) -> int:
    """``asked``: one of ACCELERATORS, or nothing for what is found here."""
    if asked and asked not in ACCELERATORS:
        print(f"ACCEL={asked}: expected {', '.join(ACCELERATORS)}", file=sys.stderr)
        return 2
    if asked:
        accelerator, reason = asked, "asked for"
    else:
        accelerator, reason = detect(platform.system(), nvidia_gpu(), cuda_compiler())
    print(f"accelerator: {accelerator} ({reason})", file=sys.stderr)
    print(accelerator)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
