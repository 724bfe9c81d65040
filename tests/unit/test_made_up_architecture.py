"""A model of nobody's is quantized by what its blocks say of themselves: no table knows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto import configuration_auto, modeling_auto

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.engines.transformers.weights import load
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert, plan
from quantkit.quantize.rounding import plain_asymmetric, plain_symmetric
from tests.models import VOCABULARY, write_tokenizer

WIDTH, HEADS, HEAD, INNER = 128, 4, 32, 256


class OtterConfig(PretrainedConfig):
    model_type = "otter"

    def __init__(self, **settings: Any) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = VOCABULARY, WIDTH, 2
        self.max_position_embeddings = 512
        super().__init__(**settings)


class Even(nn.Module):
    """RMS norm by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (1 + self.weight.float())).type_as(x)


class Look(nn.Module):
    """Attention with two heads of keys and values; ``slope``: what a distance costs."""

    def __init__(self) -> None:
        super().__init__()
        self.seek = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.offer = nn.Linear(WIDTH, HEADS * HEAD // 2, bias=False)
        self.carry = nn.Linear(WIDTH, HEADS * HEAD // 2)
        self.bring = nn.Linear(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (-1, HEAD)).transpose(1, 2)

        queries = heads(self.seek(x))
        keys = heads(self.offer(x)).repeat_interleave(2, 1)
        values = heads(self.carry(x)).repeat_interleave(2, 1)
        y = functional.scaled_dot_product_attention(queries, keys, values, slope)
        output: torch.Tensor = self.bring(y.transpose(1, 2).flatten(2))
        return output


class Think(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.door, self.room = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.way = nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.way(functional.gelu(self.door(x)) * self.room(x))
        return output


class OtterStage(nn.Module):
    """A norm before attention and one after it, before its output is added."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.look, self.leave = Even(), Look(), Even()
        self.settle, self.think = Even(), Think()

    def forward(self, stream: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        stream = stream + self.leave(self.look(self.enter(stream), slope=slope))
        output: torch.Tensor = stream + self.think(self.settle(stream))
        return output


class OtterPreTrained(PreTrainedModel):
    config_class = OtterConfig
    base_model_prefix = "otter"
    _supports_sdpa = True
    _no_split_modules = ("OtterStage",)

    def get_input_embeddings(self) -> Any:
        return self.base_model.words


class OtterModel(OtterPreTrained):
    def __init__(self, config: OtterConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, WIDTH)
        self.stages = nn.ModuleList(OtterStage() for _ in range(config.num_hidden_layers))
        self.last = Even()
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        stream = self.words(input_ids)
        places = torch.arange(input_ids.shape[1])
        behind = (places[None] - places[:, None]).float()
        slope = (behind * 0.1).masked_fill(behind > 0, float("-inf"))[None, None]
        for stage in self.stages:
            stream = stage(stream, slope)
        return BaseModelOutputWithPast(last_hidden_state=self.last(stream))


class OtterForCausalLM(OtterPreTrained, GenerationMixin):
    def __init__(self, config: OtterConfig) -> None:
        super().__init__(config)
        self.otter = OtterModel(config)
        self.speak = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.speak(self.otter(input_ids).last_hidden_state))


@pytest.fixture(scope="module", autouse=True)
def _known_to_transformers() -> Iterator[None]:
    AutoConfig.register("otter", OtterConfig)
    AutoModelForCausalLM.register(OtterConfig, OtterForCausalLM)
    yield
    configuration_auto.CONFIG_MAPPING._extra_content.pop("otter")
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(OtterConfig)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("otter")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OtterConfig(architectures=["OtterForCausalLM"]))
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            tensor.normal_(0, 0.2)
            tensor[torch.randperm(len(tensor))[:4]] += 5 * ("enter" in name or "settle" in name)
        else:
            tensor.normal_(0, 0.8 if "words" in name else 0.09)
        state[name] = tensor.bfloat16()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(directory)
    write_tokenizer(directory)
    return Checkpoint.open(directory)


@pytest.fixture(scope="module")
def windows(source: Checkpoint) -> Calibration:
    text = load_text("pydoc:calibration")
    return calibrate(text, source.tokenizer, samples=32, sequence_length=64, seed=0)


def _logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits.log_softmax(-1)
    return found


def _divergence(source: Checkpoint, other: Any) -> float:
    exact = _logits(load(source, torch.float32))
    return float((exact.exp() * (exact - _logits(other))).sum(-1).mean())


def test_its_structure_is_found(source: Checkpoint) -> None:
    found = DecoderBlocks(source).structure(0)
    assert found.inputs == (
        ("look.seek", "look.offer", "look.carry"),
        ("look.bring",),
        ("think.door", "think.room"),
        ("think.way",),
    )
    assert found.writers == {"think.way": "settle"}  # attention's output passes a norm first
    assert [(fold.smooth_layer, fold.balance_layers, fold.offset) for fold in found.folds] == [
        ("enter", found.inputs[0], 1.0),
        ("look.carry", ("look.bring",), 0.0),
        ("settle", found.inputs[2], 1.0),
        ("think.room", ("think.way",), 0.0),
    ]


@pytest.mark.parametrize("spec", ["gptq:w4g32", "awq:w4g32"])
def test_it_is_nearer_to_its_source_than_rounded_to_nearest(
    spec: str, source: Checkpoint, windows: Calibration, tmp_path: Path
) -> None:
    asked = Spec.parse(spec)
    notes = plan(source, asked).notes
    (note,) = notes
    assert note.endswith("does not have OtterForCausalLM: it will not serve this variant")
    variant = convert(source, asked, windows, tmp_path)
    rounding = plain_symmetric if asked.format == "gptq" else plain_asymmetric
    rounded: Any = load(source, torch.float32)
    for module in rounded.otter.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounding(module.weight.data, 4, 32, torch.bfloat16).dequantize()
    found = _divergence(source, load(variant, torch.float32))
    assert 0 < found < 0.8 * _divergence(source, rounded)
    assert variant.manifest is not None
    (record,) = variant.manifest.structure
    assert record.blocks == [0, 1]
    assert record.writers == ["think.way"]
    assert [(fold.smooth_layer, fold.offset) for fold in record.folds] == [
        ("enter", 1.0),
        ("look.carry", 0.0),
        ("settle", 1.0),
        ("think.room", 0.0),
    ]
    assert record.unfolded == {}
