"""Whether vLLM has kernels for packed integers on this CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

_CPU = Path("/proc/cpuinfo")
_FLAGS = _CPU.read_text() if _CPU.is_file() else ""

needs_integer_kernels = pytest.mark.skipif(
    "avx2" in _FLAGS and "avx512" not in _FLAGS,
    reason="vLLM has no kernel for packed integers on a CPU without AVX-512",
)
