"""The language model of a checkpoint that also sees is quantized; the rest is carried over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from quantkit.data.calibration import calibrate
from quantkit.data.texts import load_text
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.decoder.proof import streamed
from quantkit.engines.transformers.weights import check, load
from quantkit.errors import ConversionError, QuantkitError
from quantkit.formats.detect import open_variant
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert, plan
from quantkit.quantize.rounding import plain_asymmetric, plain_symmetric
from tests.models import VOCABULARY, write_tokenizer

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "gemma3": (
        {"model_type": "gemma3_text"},
        {"model_type": "siglip_vision_model"},
        {"vision_tower", "multi_modal_projector"},
    ),
    "mistral3": (
        {"model_type": "mistral"},
        {"model_type": "pixtral"},
        {"vision_tower", "multi_modal_projector"},
    ),
    "qwen3_5": (
        {
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        {"model_type": "qwen3_5", "depth": 1, "num_heads": 2, "out_hidden_size": 128},
        {"visual"},
    ),
}


def _make(family: str, directory: Path) -> Path:
    text, vision, _ = CASES[family]
    config = AutoConfig.for_model(family, text_config=TEXT | text, vision_config=VISION | vision)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2 and "embed" not in name and "lm_head" not in name:
            tensor.normal_(0, 0.09)
        elif tensor.dim() == 2:
            tensor.normal_(0, 0.3)
    model.to(torch.bfloat16).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module", params=list(CASES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(_make(request.param, tmp_path_factory.mktemp("models") / request.param))


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(5))


def _whole(path: Path, architecture: str) -> torch.Tensor:
    """Logits of the whole model, which is asked for text only."""
    class_: Any = getattr(transformers, architecture)
    model = class_.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=_ids()).logits
    return found


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=_ids()).logits
    return found


def test_blocks_and_the_reference_compute_what_the_whole_model_does(source: Checkpoint) -> None:
    expected = _whole(source.path, source.architecture)
    blocks = DecoderBlocks(source)
    assert (streamed(blocks, _ids(), len(blocks)) - expected).abs().max() < 1e-3
    check(source)
    assert (_logits(load(source, torch.float32)) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("written", ["gptq:w4g32", "awq:w4g32"])
def test_a_variant_is_nearer_than_rounding_and_sees_as_the_source(
    written: str, source: Checkpoint, tmp_path: Path
) -> None:
    spec = Spec.parse(written)
    parts = CASES[source.config["model_type"]][2]
    beside = DecoderBlocks(source).beside
    assert beside
    (note,) = [note for note in plan(source, spec).notes if "are not text" in note]
    assert note.startswith(f"{len(beside)} tensors are not text and are copied as they are: ")
    text = load_text("pydoc:calibration")
    windows = calibrate(text, source.tokenizer, samples=32, sequence_length=64, seed=0)
    variant = convert(source, spec, windows, tmp_path)

    shards = [safe_open(file, framework="pt") for file in variant.path.glob("*.safetensors")]
    made = {name: shard.get_tensor(name) for shard in shards for name in shard.keys()}  # noqa: SIM118
    for name in beside:
        stored = source.read(name)
        assert made[name].dtype == stored.dtype
        assert torch.equal(made[name].view(torch.uint8), stored.view(torch.uint8))
    config = json.loads((variant.path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source.path / "config.json").read_text())
    if spec.format == "awq":
        assert parts <= set(quantization["modules_to_not_convert"])
    else:
        assert {rf"-:(?:.*\.)?{part}(?:\..*)?$" for part in parts} <= set(quantization["dynamic"])

    exact = _logits(load(source, torch.float32)).log_softmax(-1)

    def divergence(model: Any) -> float:
        return float((exact.exp() * (exact - _logits(model).log_softmax(-1))).sum(-1).mean())

    rounded = load(source, torch.float32)
    rounding = plain_symmetric if spec.format == "gptq" else plain_asymmetric
    for module in rounded.base_model.modules():
        if isinstance(module, nn.Linear) and module.weight.shape[1] % 32 == 0:
            module.weight.data = rounding(module.weight.data, 4, 32, torch.bfloat16).dequantize()
    unpacked = load(open_variant(variant.path), torch.float32)
    assert 0 < divergence(unpacked) < divergence(rounded)


def _changed(tmp_path: Path, **text: Any) -> Path:
    path = _make("mistral3", tmp_path / "changed")
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= text
    file.write_text(json.dumps(config))
    return path


def test_a_text_config_that_describes_other_weights_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(QuantkitError) as caught:
        DecoderBlocks(Checkpoint.open(_changed(tmp_path, hidden_size=256)))
    assert "config.json asks for" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_config_without_a_causal_language_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="has no causal language model") as caught:
        DecoderBlocks(Checkpoint.open(_changed(tmp_path, model_type="qwen3_vl_text")))
    assert "\n" not in str(caught.value)
