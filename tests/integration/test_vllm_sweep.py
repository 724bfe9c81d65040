"""vLLM computes from our GPTQ and AWQ what transformers does from the unpacked weights.

A sample of families here, all of them with ``-m slow`` (a quarter of an hour).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from quantkit import toolchains
from quantkit.engines.vllm import architectures
from quantkit.errors import ToolchainError
from tests.integration.vllm_sweep import FAMILIES, SERVED, Outcome, outcomes, sweep
from tests.vllm_kernels import needs_integer_kernels

SAMPLE = (
    "glm4",  # what is stored as one, where vLLM expects parts
    "gemma4_text",  # bare parameters in blocks
    "lfm2",  # heads that the CPU's rotary kernel computes wrongly
)
REFUSED: dict[str, tuple[str, ...]] = {"gpt_oss": ("gptq", "awq")}
"""By family, what vLLM does not serve, or serves wrongly."""


def _check(one: Outcome) -> None:
    for what in SERVED:
        assert one.agrees(what) == (what not in REFUSED.get(one.model_type, ())), one


def _sweep(model_types: Sequence[str], work: Path) -> None:
    try:
        toolchains.find("vllm")
    except ToolchainError as error:
        pytest.skip(str(error))
    for one in sweep(model_types, work):
        _check(one)


@needs_integer_kernels
def test_sample(tmp_path: Path) -> None:
    _sweep(SAMPLE, tmp_path)


@pytest.mark.slow
@needs_integer_kernels
def test_all_others(tmp_path: Path) -> None:
    _sweep([name for name in FAMILIES if name not in SAMPLE], tmp_path)


def test_what_was_swept_is_what_quantkit_says() -> None:
    found = outcomes()
    assert found.keys() == set(FAMILIES)
    for one in found.values():
        _check(one)
        assert one.name in architectures.SEEN or not one.experts or one.model_type in REFUSED
        assert bool(architectures.unread(one.name)) == (one.model_type in REFUSED)
