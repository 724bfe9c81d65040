"""Importance matrices as files, and what is kept of them."""

from __future__ import annotations

import re
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.data.calibration import Calibration
from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.detect import written
from quantkit.formats.gguf.header import read_header
from quantkit.formats.gguf.imatrix import ImportanceMatrix, InputSquares
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.variant import IMATRIX, CalibrationRecord
from quantkit.producers.gguf import importance
from tests.models import make_checkpoint

LINEAR, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


def matrix() -> ImportanceMatrix:
    """A linear that saw 4 tokens, and three experts of which the second saw none."""
    linear = InputSquares(np.float32([[2, 4, 0]]), np.float32([4]))
    experts = InputSquares(np.float32([[6, 3], [0, 0], [1, 5]]), np.float32([3, 0, 2]))
    return ImportanceMatrix({LINEAR: linear, EXPERTS: experts}, ("a.txt", "b.txt"), 2, 512)


def legacy(calls: int = 2, tail: bytes = struct.pack("<ii5s", 7, 5, b"a.txt")) -> bytes:
    """The old format by llama.cpp's description: sums over calls, not over tokens."""
    name = LINEAR.encode()
    entry = struct.pack(f"<i{len(name)}sii3f", len(name), name, calls, 3, 1.0, 2.0, 0.5)
    return struct.pack("<i", 1) + entry + tail


def windows(samples: int, length: int, seed: int = 0) -> Calibration:
    ids = torch.randint(0, 1024, (samples, length), generator=torch.Generator().manual_seed(seed))
    record = CalibrationRecord(
        dataset="test",
        revision=None,
        samples=samples,
        sequence_length=length,
        seed=seed,
        sha256=f"{samples}{length}{seed}",
    )
    return Calibration(ids, record, torch.device("cpu"), torch.float32)


def test_weights_are_means_of_squares_and_one_where_nothing_was_seen() -> None:
    found = matrix()
    assert found.weights("blk.1.attn_q.weight") is None
    for name, expected in ((LINEAR, [0.5, 1, 0]), (EXPERTS, [2, 1, 1, 1, 0.5, 2.5])):
        weights = found.weights(name)
        assert weights is not None
        assert weights.dtype == np.float32
        assert weights.tolist() == expected


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    matrix().write(path)
    found = ImportanceMatrix.read(path)
    assert (found.datasets, found.chunks, found.chunk_size) == (("a.txt", "b.txt"), 2, 512)
    assert found.entries.keys() == {LINEAR, EXPERTS}
    for name, entry in matrix().entries.items():
        assert np.array_equal(found.entries[name].sums, entry.sums)
        assert np.array_equal(found.entries[name].counts, entry.counts)
    assert list(read_header(path).metadata) == [
        "general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
    ]  # fmt: skip


def test_what_newer_versions_of_llama_imatrix_add_is_passed_over(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "newer.gguf", "")
    writer.add_type(gguf.GGUFType.IMATRIX)
    for name, values in ((".in_sum2", [2, 4, 0]), (".counts", [4]), (".in_sum", [1, -2, 0])):
        writer.add_tensor(LINEAR + name, np.float32(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = ImportanceMatrix.read(tmp_path / "newer.gguf").weights(LINEAR)
    assert weights is not None
    assert weights.tolist() == [0.5, 1, 0]


def test_experts_that_saw_nothing_are_counted_and_named() -> None:
    seen = InputSquares(np.ones((3, 2), np.float32), np.float32([1, 2, 3]))
    entries = {
        f"blk.{block}.ffn_{part}_exps.weight": entry
        for block, entry in enumerate((seen, matrix().entries[EXPERTS]))
        for part in ("up", "down")
    }
    found = ImportanceMatrix({LINEAR: matrix().entries[LINEAR], **entries}, ("t",), 1, 8)
    (note,) = found.notes()
    assert note.startswith("imatrix: 1 of 6 experts saw no token")
    assert "(blk.1 1)" in note
    assert ImportanceMatrix({"blk.0.ffn_down_exps.weight": seen}, (), 1, 8).notes() == ()
    assert ImportanceMatrix({LINEAR: matrix().entries[LINEAR]}, (), 1, 8).notes() == ()


def test_the_old_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy())
    found = ImportanceMatrix.read(path)
    assert (found.datasets, found.chunks) == (("a.txt",), 7)
    weights = found.weights(LINEAR)
    assert weights is not None
    assert weights.tolist() == [0.5, 1.0, 0.25]
    path.write_bytes(legacy(calls=0, tail=b""))
    found = ImportanceMatrix.read(path)
    assert (found.datasets, found.chunks) == ((), 0)
    assert list(found.entries[LINEAR].sums[0] / found.entries[LINEAR].counts) == [1.0, 2.0, 0.5]


def test_what_is_cut_off_or_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "imatrix"
    matrix().write(path)
    for whole in (path.read_bytes(), legacy()):
        for length in range(0, len(whole) - 40, 7):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError) as error:
                ImportanceMatrix.read(path)
            assert len(str(error.value).splitlines()) == 1
    path.write_bytes(b"some text that is no matrix" * 20)
    with pytest.raises(CheckpointError, match=r"neither GGUF nor \.dat.*llama-imatrix -m"):
        ImportanceMatrix.read(path)
    with pytest.raises(CheckpointError, match=r"absent: importance matrix: No such file"):
        ImportanceMatrix.read(tmp_path / "absent")


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for sums, counts in (([[1, np.nan]], [4]), ([[1, 2]], [np.inf])):
        bad = InputSquares(np.float32(sums), np.float32(counts))
        ImportanceMatrix({LINEAR: bad}, ("t",), 1, 8).write(tmp_path / "bad.gguf")
        with pytest.raises(CheckpointError, match=rf"the importance of {LINEAR} is not finite"):
            ImportanceMatrix.read(tmp_path / "bad.gguf")


def test_a_model_is_not_taken_for_a_matrix(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"not an importance matrix, but a GGUF .* 'model'"):
        ImportanceMatrix.read(tmp_path / "model.gguf")


def test_it_does_not_stand_in_for_the_weights_of_a_variant(tmp_path: Path) -> None:
    matrix().write(tmp_path / IMATRIX)
    (tmp_path / "model-IQ2_XS.gguf").touch()
    assert written(tmp_path, "gguf", "IQ2_XS").weights.name == "model-IQ2_XS.gguf"


def test_the_sums_are_those_of_transformers(tiny_qwen2: Path) -> None:
    from transformers import AutoModelForCausalLM

    calibration = windows(3, 40)
    found = importance.compute(Checkpoint.open(tiny_qwen2), calibration)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    sums: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        for theirs, ours in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
            layer.get_submodule(theirs).register_forward_pre_hook(
                lambda _, inputs, name=f"blk.{index}.{ours}.weight": sums.update(
                    {name: inputs[0].square().sum((0, 1))}
                )
            )
    with torch.no_grad():
        model(calibration.ids)
    assert len(sums) == 4
    assert len(found.entries) == 14
    assert (found.datasets, found.chunks, found.chunk_size) == (("test",), 3, 40)
    for name, expected in sums.items():
        entry = found.entries[name]
        assert entry.counts.tolist() == [120]
        assert np.allclose(entry.sums[0], expected.numpy(), rtol=1e-4)


def test_experts_see_the_tokens_that_transformers_routes_to_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = make_checkpoint(
        tmp_path / "moe",
        family="qwen3_moe",
        hidden_size=64,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    calibration = windows(1, 6)  # 12 places for 16 experts
    found = importance.compute(Checkpoint.open(directory), calibration)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    routed: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, inputs: routed.append((inputs[0], inputs[1]))
        )
    with torch.no_grad():
        model(calibration.ids)
    unseen = []
    for block, (inputs, chosen) in enumerate(routed):
        counts = torch.bincount(chosen.flatten(), minlength=16)
        unseen += [str(number) for number in torch.where(counts == 0)[0].tolist()]
        sums = torch.stack([inputs[(chosen == n).any(1)].square().sum(0) for n in range(16)])
        for part in ("gate", "up", "down"):
            entry = found.entries[f"blk.{block}.ffn_{part}_exps.weight"]
            assert entry.counts.tolist() == counts.tolist()
            if part != "down":
                assert np.allclose(entry.sums, sums.numpy(), rtol=1e-4)
    (note,) = found.notes()
    assert note.startswith(f"imatrix: {len(unseen)} of 32 experts")
    named = note.partition("(")[2].partition(")")[0]
    assert re.findall(r"(?<!\.)\b\d+", named) == unseen


def test_it_is_computed_once_for_the_same_weights_and_tokens(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path))
    checkpoint = Checkpoint.open(tiny_llama)
    compute = partial(importance.compute, checkpoint)
    kept = partial(importance.importance, by="quantkit")
    first = kept(checkpoint, windows(2, 16), compute=compute)
    other = kept(checkpoint, windows(2, 16, seed=1), compute=compute)
    again = kept(
        Checkpoint.open(tiny_llama),
        windows(2, 16),
        compute=lambda _: pytest.fail("computed again"),
    )
    assert first.entries.keys() == again.entries.keys() == other.entries.keys()
    for name, entry in first.entries.items():
        assert np.array_equal(entry.sums, again.entries[name].sums)
        assert not np.array_equal(entry.sums, other.entries[name].sums)
    theirs = kept(checkpoint, windows(2, 16), compute=lambda _: other, by="llama.cpp")
    assert theirs is other
    assert len(list((tmp_path / "imatrix").iterdir())) == 3


def test_an_architecture_without_names_in_a_gguf_is_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "gemma", family="gemma", head_dim=64)
    with pytest.raises(ConversionError, match=r"not for Gemma.*bring a file \(--imatrix\)"):
        importance.compute(Checkpoint.open(directory), windows(1, 8))
