"""Opening checkpoints: every kind of damage has its own line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantkit.errors import CheckpointError
from quantkit.models.checkpoint import Checkpoint


@pytest.fixture
def copy(tiny_qwen2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen2, tmp_path / "model"))


def test_shards_are_read_tensor_by_tensor(tiny_qwen2: Path) -> None:
    checkpoint = Checkpoint.open(tiny_qwen2)
    stored = {}
    for shard in sorted(tiny_qwen2.glob("*.safetensors")):
        stored.update(load_file(shard))
    assert set(checkpoint.tensors) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
    assert checkpoint.parameters == sum(t.numel() for t in stored.values())
    assert checkpoint.bytes == sum(t.nbytes for t in stored.values())
    assert checkpoint.scheme == "bf16"


def _expect(path: Path | str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)


def test_no_such_directory(tmp_path: Path) -> None:
    _expect(tmp_path / "absent", "no such directory; give one, a hub id")


def test_a_file_is_not_a_checkpoint(copy: Path) -> None:
    _expect(copy / "config.json", "is a file; a checkpoint is a directory")


def test_no_safetensors(copy: Path) -> None:
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    _expect(copy, "no safetensors; expected model.safetensors")


def test_only_pickle(copy: Path) -> None:
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    _expect(copy, r"no safetensors, only pytorch_model\.bin, which may be pickle")


def test_truncated_safetensors(copy: Path) -> None:
    shard = copy / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    _expect(copy, r"model-00002-of-00002\.safetensors: damaged or truncated .*download it again")


def test_empty_safetensors(copy: Path) -> None:
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"")
    _expect(copy, "damaged or truncated")


def test_missing_shard(copy: Path) -> None:
    (copy / "model-00002-of-00002.safetensors").unlink()
    _expect(copy, r"model-00002-of-00002\.safetensors: no such file; .*index\.json names it")


def test_an_index_cannot_point_outside(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (copy.parent / "elsewhere.safetensors").write_bytes(b"")
    index.write_text(json.dumps(content))
    _expect(
        copy, r"index\.json: lm_head\.weight is in .\.\./elsewhere\.safetensors., expected the name"
    )


def test_missing_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    _expect(copy, r"no tokenizer \(tokenizer\.json or tokenizer\.model\)")


def test_damaged_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(CheckpointError, match="unreadable tokenizer"):
        _ = Checkpoint.open(copy).tokenizer


def test_missing_and_damaged_config(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    _expect(copy, r"config\.json: not JSON")
    (copy / "config.json").write_text("[]")
    _expect(copy, "expected a JSON object, found list")
    (copy / "config.json").unlink()
    _expect(copy, r"config\.json: no such file")


def test_code_of_a_checkpoint_is_not_run(copy: Path) -> None:
    marker = copy.parent / "ran"
    (copy / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "modeling_evil.EvilConfig"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _ = Checkpoint.open(copy).hf_config
    assert not marker.exists()


def test_unknown_demo_source() -> None:
    _expect("demo:smollm2-135", r"unknown demo source.*did you mean 'smollm2-135m'\?")


def test_a_hub_id_without_a_network_is_one_line() -> None:
    _expect("quantkit-tests/no-such-model", "not a local directory, and the hub said")
