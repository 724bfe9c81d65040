"""A checkpoint with any one value replaced is planned, or refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantkit.engines.transformers.weights import load
from quantkit.errors import QuantkitError
from quantkit.formats.detect import open_model
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import plan
from quantkit.producers.gguf import sources
from tests import mutations
from tests.packed_checkpoints import as_awq, as_compressed, as_gptq, draw
from tests.packed_checkpoints import write as write_packed
from tests.unit.test_packed_checkpoints import AWQ, COMPRESSED, GPTQ

SPECS = (Spec.parse("gguf:Q8_0"), Spec.parse("gptq:w4g64"))


def attempt(path: Path) -> None:
    """Open and plan; of a packed checkpoint read the weights."""
    sources.content_of.cache_clear()
    model = open_model(path)
    if isinstance(model, Variant):
        load(model, torch.float32)
        return
    for spec in SPECS:
        plan(model, spec)


def refusal(path: Path) -> str | None:
    """What is said of a checkpoint that cannot be used; anything but a QuantkitError is a bug."""
    try:
        attempt(path)
    except QuantkitError as error:
        return str(error)
    return None


def try_all(file: Path, mutated: list[mutations.Mutation], wrap: str | None = None) -> None:
    """Replace one value after another of a file, or of what it has under the key ``wrap``."""
    original = json.loads(file.read_text()) if wrap else {}
    refusals = []
    for place, value, changed in mutated:
        file.write_text(json.dumps(original | {wrap: changed} if wrap else changed))
        try:
            refusals.append(refusal(file.parent))
        except Exception as error:
            raise AssertionError(f"{file.name}: {place} = {value!r}") from error
        assert "\n" not in (refusals[-1] or ""), (place, value)
    assert any(refusals)


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "count"),
    [("config.json", 80), ("tokenizer_config.json", 25), ("tokenizer.json", 40)],
)
def test_any_value_of_a_file(copy: Path, name: str, count: int) -> None:
    try_all(copy / name, mutations.sample(json.loads((copy / name).read_text()), count))


def test_any_value_of_a_generation_config(copy: Path) -> None:
    original = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "eos_token_id": [2, 0]}
    try_all(copy / "generation_config.json", mutations.sample(original, 30))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_any_value_of_a_quantization(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    name, drawn = "model.layers.0.self_attn.q_proj", draw((256, 256), 4, 4)
    parts, settings = {
        "gptq": (as_gptq(drawn, 4, stored_less=1, g_idx=True), GPTQ),
        "awq": (as_awq(drawn), AWQ),
        "compressed-tensors": (as_compressed(drawn, 4, asymmetric=True), COMPRESSED),
    }[method]
    path = write_packed(tiny_llama, tmp_path / "theirs", {name: parts}, settings)
    try_all(path / "config.json", mutations.sample(settings, 25), wrap="quantization_config")


@pytest.mark.parametrize(
    "value",
    ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "x\0y", 3, None, [], {}],
)
def test_an_index_names_files_beside_it(tiny_qwen2: Path, tmp_path: Path, value: Any) -> None:
    copy = Path(shutil.copytree(tiny_qwen2, tmp_path / "model"))
    index = copy / "model.safetensors.index.json"
    original = json.loads(index.read_text())
    first = next(iter(original["weight_map"]))
    for changed in (
        original | {"weight_map": original["weight_map"] | {first: value}},
        original | {"weight_map": value},
    ):
        index.write_text(json.dumps(changed))
        with pytest.raises(QuantkitError, match=r"index\.json") as caught:
            Checkpoint.open(copy)
        assert "\n" not in str(caught.value)


def test_safetensors_without_tensors(copy: Path) -> None:
    save_file({}, copy / "model.safetensors")
    with pytest.raises(QuantkitError, match="hold no tensors"):
        open_model(copy)
