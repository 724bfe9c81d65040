"""Every causal class of transformers: streamed, quantized by GPTQ and AWQ, opened again.

A sample by family here, all of them with ``-m slow`` (a quarter of an hour). What the classes that
fail are refused with is in ``REFUSED``: one line, and no wrong numbers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import vllm_sweep
from tests.integration.models_page import PAGE, page
from tests.integration.small_decoders import CLASSES, NOT_BUILT
from tests.integration.sweep import SPECS, outcomes, sweep

SAMPLE = (
    "qwen3_5_text",  # hybrid linear attention, gated norms
    "gemma4_text",  # sliding windows, inputs for each layer
    "gpt_oss",  # sinks, stacks of experts that are turned and mixed, with biases
    "llama4_text",  # experts that are each given every token
    "deepseek_v3",  # latents, a dense first layer, shared experts
    "bloom",  # what it gives to blocks has a part for each head of each window
    "gptj",  # blocks that give tuples, buffers that follow from the config
)
REFUSED: dict[str, str] = {
    **dict.fromkeys(("hrm_text", "kimi_linear", "longcat_flash", "olmo_hybrid"), "converts"),
    **dict.fromkeys(("gemma3n_text", "hy_v4", "cpmant"), "cannot be run one by one"),
    **dict.fromkeys(("prophetnet", "qwen4_exp_text", "xlnet", "xmod"), "cannot be run one by one"),
    **dict.fromkeys(("xlm", "zaya"), "logits differ"),
    "inkling_text": "has no such tensor",
}
"""By class, a part of why its blocks are not read."""
UNDECIDED: dict[str, tuple[str, ...]] = {
    # The structure of its blocks, several streams side by side, is not found yet.
    "deepseek_v4": ("gptq", "awq"),
}
"""By class, the methods that do not take it, or do not beat rounding to nearest."""

_EVERY = [name for name in CLASSES if name not in NOT_BUILT]


def _check(model_type: str) -> None:
    found = sweep(model_type)
    if model_type in REFUSED:
        assert REFUSED[model_type] in found.why["streams"]
        assert "\n" not in found.why["streams"]
        return
    assert found.works("streams"), found.why
    for method in SPECS:
        assert found.works(method) == (method not in UNDECIDED.get(model_type, ())), found


@pytest.mark.parametrize("model_type", SAMPLE)
def test_sample_streams_and_is_nearer_than_rounded_to_nearest(model_type: str) -> None:
    _check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in _EVERY if name not in SAMPLE])
def test_every_other_class_does_or_is_refused_in_a_line(model_type: str) -> None:
    _check(model_type)


LEAST = {"streams": 0.9, "gptq": 0.9, "awq": 0.9}
"""Of those that were swept."""


def test_most_classes_are_read_and_quantized() -> None:
    """As swept for ``docs/models.md``."""
    found = outcomes()
    assert found.keys() <= set(_EVERY)
    for what, least in LEAST.items():
        assert sum(one.works(what) for one in found.values()) >= least * len(found), what
    assert {name for name, one in found.items() if not one.works("streams")} <= REFUSED.keys()


def test_the_page_of_models_is_what_the_sweep_found() -> None:
    assert Path(PAGE).read_text(encoding="utf-8") == page(outcomes(), vllm_sweep.outcomes())
