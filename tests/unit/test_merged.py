"""LoRA adapters merged into their base: the oracle is PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import CheckpointError
from quantkit.formats.merged import open_merged
from quantkit.models.checkpoint import Checkpoint
from tests.adapters import make_adapter, merged_by_peft
from tests.models import make_checkpoint

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "every linear, bf16": {"target_modules": ALL, "dtype": torch.bfloat16},
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3, "v_proj": 32},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "embedding, bf16": {"target_modules": ["embed_tokens"], "dtype": torch.bfloat16},
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    "dora": {"target_modules": [*ALL, "embed_tokens"], "use_dora": True},
    "some layers": {"layers_to_transform": [1], "target_modules": ALL},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's blocks, not tied."""
    path = tmp_path_factory.mktemp("base") / "Tiny-Llama"
    return make_checkpoint(path, tie_word_embeddings=False)


def _compare(base: Path, adapter: Path, tmp_path: Path) -> set[str]:
    """Every tensor with PEFT's; the names of those that are not the base's."""
    theirs = Checkpoint.open(merged_by_peft(base, adapter, tmp_path / "theirs"))
    ours = open_merged(base, adapter)
    assert ours.tensors.keys() == theirs.tensors.keys()
    changed = set()
    for name, info in ours.tensors.items():
        merged = ours.read(name)
        assert (merged.shape, merged.dtype) == (info.shape, info.torch_dtype)
        expected = theirs.read(name)
        assert torch.equal(merged, expected.to(merged.dtype)), name
        if not torch.equal(merged, Checkpoint.open(base).read(name)):
            changed.add(name)
    return changed


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_that_of_peft(case: str, base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **CASES[case])
    assert _compare(base, adapter, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("use_dora", [False, True])
def test_other_dtypes_of_the_base(dtype: torch.dtype, use_dora: bool, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", dtype=dtype, tie_word_embeddings=False)
    targets = ["q_proj", "embed_tokens"]
    adapter = make_adapter(base, tmp_path / "a", use_dora=use_dora, target_modules=targets)
    assert _compare(base, adapter, tmp_path)


def test_matrices_that_are_stored_turned(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", family="gpt2", n_embd=64, n_head=4, n_layer=2)
    for number, targets in enumerate((["c_attn", "c_proj"], ["c_fc", "c_proj"])):
        for use_dora in (False, True):
            place = tmp_path / f"{number}{use_dora}"
            adapter = make_adapter(base, place / "a", target_modules=targets, use_dora=use_dora)
            assert len(_compare(base, adapter, place)) == 6
