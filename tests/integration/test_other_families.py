"""GPTQ and AWQ of families that no list of the quantizers names: nearer than rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantkit.data.calibration import calibrate
from quantkit.data.texts import load_text
from quantkit.engines.transformers.weights import load
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from quantkit.quantize.rounding import plain_asymmetric, plain_symmetric
from tests.integration.gguf_cases import CASES, make

IDS = torch.randint(3, 900, (8, 64), generator=torch.Generator().manual_seed(5))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.float().log_softmax(-1)
    return found


@pytest.mark.parametrize(
    "family", ["gemma-2", "gemma-3", "phi-3", "olmo-2", "granite-3", "stablelm-2", "gpt-neox"]
)
def test_other_families_are_nearer_than_rounded_to_nearest(family: str, tmp_path: Path) -> None:
    source = Checkpoint.open(make(CASES[family], tmp_path / family))
    text = load_text("pydoc:calibration")
    windows = calibrate(text, source.tokenizer, samples=16, sequence_length=64, seed=0)
    exact = _logits(load(source, torch.float32))
    for spec, rounding in (("gptq:w4g32", plain_symmetric), ("awq:w4g32", plain_asymmetric)):
        made = _logits(load(convert(source, Spec.parse(spec), windows, tmp_path), torch.float32))
        model: Any = load(source, torch.float32)
        for module in model.base_model.modules():
            if isinstance(module, nn.Linear):
                rounded = rounding(module.weight.data, 4, 32, torch.bfloat16)
                module.weight.data = rounded.dequantize()
        found, plain = (
            float((exact.exp() * (exact - other)).sum(-1).mean())
            for other in (made, _logits(model))
        )
        assert 0 < found < 0.85 * plain, spec
