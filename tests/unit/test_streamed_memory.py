"""What a conversion holds does not grow with the number of blocks, and may lie on disk."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantkit.data.calibration import Calibration, calibrate
from quantkit.data.texts import load_text
from quantkit.decoder import activations
from quantkit.decoder.blocks import DecoderBlocks
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from tests.models import make_checkpoint

SPECS = (
    {"spec": "gptq:w4g64"},
    {"spec": "awq:w4g64"},
    {"spec": "gptq:w4g64", "rounding": "learned", "iters": 1},
)


def _source(directory: Path, blocks: int) -> tuple[Checkpoint, Calibration]:
    source = Checkpoint.open(make_checkpoint(directory, num_hidden_layers=blocks))
    text = load_text("pydoc:calibration")
    return source, calibrate(text, source.tokenizer, samples=8, sequence_length=64, seed=0)


def _held() -> int:
    """Bytes of all tensors that are alive, but for those that were before (``gc.freeze``)."""
    gc.collect()
    alive = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not o.is_meta)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    return sum(storages.values())


@pytest.fixture
def _frozen() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_frozen")
@pytest.mark.parametrize("entry", SPECS[:2], ids=["gptq", "awq"])
def test_sixteen_blocks_take_no_more_than_four(
    entry: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    load = DecoderBlocks.load

    def watched(blocks: DecoderBlocks, index: int) -> nn.Module:
        module = load(blocks, index)
        held.append(_held())
        return module

    monkeypatch.setattr(DecoderBlocks, "load", watched)
    most = {}
    # Each block is compared with transformers', quantized, and loaded again to be judged beside
    # what was made of it. AWQ loads it once more: its norms took the scales.
    loads, room = (4, 5.5) if entry["spec"].startswith("awq") else (3, 4)
    for count in (4, 16):
        source, windows = _source(tmp_path / f"model-{count}", count)
        held.clear()
        convert(source, Spec.of_entry(entry), windows, tmp_path / f"out-{count}")
        assert len(held) == loads * count
        most[count] = max(held)
        block = sum(
            info.numel * 4 for n, info in source.tensors.items() if n.startswith("model.layers.0.")
        )
    # One block in float32 is there when it is judged, and what was made of it.
    assert block < most[4] < room * block
    assert most[16] < most[4] + block // 10


@pytest.mark.parametrize("entry", SPECS, ids=["gptq", "awq", "learned"])
def test_activations_in_a_file_give_the_same_bits(
    entry: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, windows = _source(tmp_path / "model", 2)
    spec, spilled, from_file = Spec.of_entry(entry), [], torch.from_file

    def watched(*given: Any, **named: Any) -> torch.Tensor:
        spilled.append(named["size"])
        return from_file(*given, **named)

    monkeypatch.setattr(torch, "from_file", watched)
    in_memory = convert(source, spec, windows, tmp_path / "memory").path
    assert spilled == []
    monkeypatch.setattr(activations, "MEMORY_LIMIT", 1000)
    in_file = convert(source, spec, windows, tmp_path / "file").path
    assert set(spilled) == {8 * 64 * 256, 64 * 256}  # calibration's, and what is held out
    name = "model.safetensors"
    assert (in_memory / name).read_bytes() == (in_file / name).read_bytes()
