"""Safetensors written piece by piece are the files that safetensors itself writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.formats.shards import Entry, Shards
from quantkit.models import dtypes

NAMES = {
    dtypes.torch_dtype(name): name for name in dtypes.FILE_ORDER if name[:2] not in ("F4", "F6")
}
"""All dtypes of whole bytes."""


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layer.{index}.größe": torch.randn(3, index + 1, generator=generator).to(dtype)
        for index, dtype in enumerate([*NAMES, *NAMES])
    }
    return tensors | {"scalar": torch.tensor(1.5), "odd": torch.zeros(7, dtype=torch.bfloat16)}


def _entries(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def test_bytes_equal_those_of_safetensors(tmp_path: Path) -> None:
    tensors = _tensors()
    with Shards(tmp_path, _entries(tensors)) as shards:
        for name, tensor in reversed(tensors.items()):
            shards.write(name, tensor)
            assert torch.equal(shards.read(name), tensor)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_several_shards_have_an_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    with Shards(tmp_path, _entries(tensors), shard_bytes=900) as shards:
        for name, tensor in tensors.items():
            shards.write(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert sorted(set(index["weight_map"].values())) == [
        f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")
    ]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_what_was_written_before_is_found_again(tmp_path: Path) -> None:
    tensors = _tensors()
    with Shards(tmp_path, _entries(tensors)) as shards:
        shards.write("odd", tensors["odd"] + 1)
    with Shards(tmp_path, _entries(tensors)) as shards:
        assert torch.equal(shards.read("odd"), tensors["odd"] + 1)
    others = _entries({**tensors, "odd": torch.zeros(9)})
    with Shards(tmp_path, others) as shards:
        assert torch.equal(shards.read("odd"), torch.zeros(9))


def test_another_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    with Shards(tmp_path, [Entry("a", "F32", (2, 3))]) as shards:
        for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float16)):
            with pytest.raises(AssertionError, match="a"):
                shards.write("a", wrong)
