from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantkit.engines.vllm import VLLM
from quantkit.gateway.config import Backend
from quantkit.gateway.local import Local
from quantkit.models.variant import Variant


async def no_limit(_: Any) -> None:
    """As a memory budget that never ends."""


@pytest.fixture
def engine(tmp_path: Path) -> Local:
    """Of a variant of 1 MiB; nothing is started."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    variant = Variant("m", tmp_path, "awq", "w4g64", None)
    section = Backend(path=str(tmp_path))
    return Local("m", section, variant, VLLM(), tmp_path / "log", no_limit)


def test_an_engine_that_fails_again_and_again_is_given_more_and_more_time(engine: Local) -> None:
    assert [engine._back_off() for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_what_an_engine_counts_for_before_it_has_run(engine: Local) -> None:
    """Its weights and a tenth, and vLLM itself."""
    assert engine.cost == int(1.1 * (1 << 20)) + (2 << 30)
