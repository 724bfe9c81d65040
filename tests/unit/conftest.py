"""What unit tests have in common."""

from __future__ import annotations

import pytest

from quantkit.engines.vllm import unsupported as refused


@pytest.fixture(autouse=True)
def _a_cpu_with_every_kernel(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM takes is not to depend on the machine that the tests run on."""
    cpu = tmp_path_factory.getbasetemp() / "cpuinfo"
    cpu.write_text("flags: fpu avx2 avx512f amx_tile")
    monkeypatch.setattr(refused, "_CPU", cpu)
