"""vLLM computes from our GPTQ and AWQ what transformers does from the unpacked weights.

A sample of families here, all of them with ``-m slow`` (a quarter of an hour).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from quantkit import toolchains
from quantkit.data.calibration import calibrate
from quantkit.data.texts import load_text
from quantkit.engines.vllm import architectures
from quantkit.errors import ToolchainError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from tests.integration.servers import assert_agrees
from tests.integration.small_decoders import make
from tests.integration.sweep import SPECS
from tests.integration.vllm_sweep import FAMILIES, SERVED, SETTINGS, Mixed, Outcome, outcomes, sweep
from tests.vllm_kernels import needs_integer_kernels

SAMPLE = (
    "glm4",  # what is stored as one, where vLLM expects parts
    "gemma4_text",  # bare parameters in blocks
    "lfm2",  # heads that the CPU's rotary kernel computes wrongly
)
MIXED = {
    # Run as one, which vLLM's class does not say.
    "stablelm": Mixed(r"layers\.0\.self_attn\.[qkv]_proj", r"layers\.1\.mlp\.(gate|up)_proj"),
    # Renamed by vLLM, and said.
    "lfm2": Mixed(r"layers\.0\.conv\.out_proj", r"layers\.0\.conv\.in_proj"),
    # Renamed only where it asks what is quantized.
    "granitemoehybrid": Mixed(r"layers\.0\.mamba\.out_proj", r"layers\.1\.mamba\.out_proj"),
    # Stored as one.
    "glm4": Mixed(r"layers\.0\.mlp\.gate_up_proj", r"layers\.1\.mlp\.gate_up_proj"),
}
REFUSED: dict[str, tuple[str, ...]] = {"gpt_oss": ("gptq", "awq"), "minimax_m2": SERVED}
"""By family, what vLLM does not serve, or serves wrongly."""


def _check(one: Outcome) -> None:
    for what in SERVED:
        assert one.agrees(what) == (what not in REFUSED.get(one.model_type, ())), one


def _sweep(
    model_types: Iterable[str], work: Path, mixed: Mapping[str, Mixed] | None = None
) -> None:
    try:
        toolchains.find("vllm")
    except ToolchainError as error:
        pytest.skip(str(error))
    for one in sweep(model_types, work, mixed):
        _check(one)


@needs_integer_kernels
def test_sample(tmp_path: Path) -> None:
    _sweep(SAMPLE, tmp_path)


@needs_integer_kernels
def test_linears_of_several_schemes_are_found_by_the_names_that_vllm_asks_for(
    tmp_path: Path,
) -> None:
    _sweep(MIXED, tmp_path, MIXED)


@needs_integer_kernels
def test_served_by_quantkit_heads_are_rotated_rightly(tmp_path: Path) -> None:
    source = Checkpoint.open(make("lfm2", tmp_path / "source", **SETTINGS["lfm2"]))
    text = load_text("pydoc:calibration")
    windows = calibrate(text, source.tokenizer, samples=8, sequence_length=64, seed=0)
    assert_agrees(convert(source, Spec.parse(SPECS["gptq"]), windows, tmp_path), tmp_path / "log")


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
        said = architectures.unread(one.name) or architectures.not_on_a_cpu(one.name)
        assert bool(said) == (one.model_type in REFUSED)
