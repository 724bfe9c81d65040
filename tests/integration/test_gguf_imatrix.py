"""Importance matrices against llama-imatrix and llama-quantize, on the same tokens."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.data.calibration import Calibration
from quantkit.formats.gguf.imatrix import ImportanceMatrix, InputSquares
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import IMATRIX, CalibrationRecord
from quantkit.producers.gguf.importance import compute
from quantkit.producers.native_gguf import NativeGGUF
from tests.integration.gguf_cases import CASES, make
from tests.integration.gguf_oracle import convert, loaded, tool
from tests.models import make_checkpoint

LENGTH = 128
TEXT = pydoc_data.topics.topics["strings"][:6000]
EVERY = (
    "llama-3.1", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "gemma-2", "gemma-3", "phi-3",
    "olmo-2", "granite-3", "stablelm-2-12b", "gpt-2", "gpt-2-hub", "pythia", "deepseek-v2",
    "deepseek-v2-lite", "smollm-3", "ministral-3", "olmo-3", "ernie-4.5", "seed-oss", "glm-4",
    "lfm-2", "qwen-3.5", "qwen-3.5-seeing", "qwen-3.5-moe-hub", "gpt-oss",
)  # fmt: skip
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
}
"""Rows that IQ3_XXS divides, for one model, since it takes long; those of the others are IQ4_NL."""
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class Case:
    """A checkpoint, its float32 GGUF, and what llama-imatrix and we see it do with a text."""

    checkpoint: Checkpoint
    gguf: Path
    text: Path
    theirs: Path

    @property
    def calibration(self) -> Calibration:
        """The text in the windows that llama-imatrix cuts."""
        with loaded(self.gguf, vocab_only=True) as model:
            ids = model.tokenize(self.text.read_bytes(), add_bos=False)
        count = len(ids) // LENGTH
        record = CalibrationRecord(
            dataset=str(self.text),
            revision=None,
            samples=count,
            sequence_length=LENGTH,
            seed=0,
            sha256="",
        )
        windows = torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)
        return Calibration(windows, record, torch.device("cpu"), torch.float32)


def case(directory: Path, **model: Any) -> Case:
    path = make_checkpoint(directory / "model", dtype=torch.float32, **model)
    return case_of(path, directory, TEXT)


def case_of(path: Path, directory: Path, content: str) -> Case:
    checkpoint = Checkpoint.open(path)
    gguf = convert(checkpoint, "F32", directory / "f32")
    text = directory / "text.txt"
    text.write_text(content)
    theirs = directory / "theirs.gguf"
    imatrix(gguf, text, theirs)
    return Case(checkpoint, gguf, text, theirs)


def imatrix(gguf: Path, text: Path, out: Path, *options: Any) -> None:
    # In float32 throughout: a router's choice is a matter of the last digit at times.
    tool(
        "llama-imatrix", "-m", gguf, "-f", text, "-o", out, "-c", LENGTH, "-b", LENGTH, "-t", 1,
        "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-ppl", *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("qwen2"), family="qwen2", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("experts"), family="qwen3_moe", **MOE)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_ours_equals_llama_imatrix(name: str, request: pytest.FixtureRequest) -> None:
    made: Case = request.getfixturevalue(name)
    calibration = made.calibration
    theirs, exact = ImportanceMatrix.read(made.theirs), compute(made.checkpoint, calibration)
    usual = compute(made.checkpoint, replace(calibration, precision=torch.bfloat16))
    # 7 linears in each of 2 blocks, and no output layer.
    assert len(theirs.entries) == 14
    for ours, tolerance in ((exact, 1e-4), (usual, 0.03)):
        assert ours.entries.keys() == theirs.entries.keys()
        assert (ours.datasets, ours.chunks) == (theirs.datasets, theirs.chunks)
        assert ours.chunk_size == theirs.chunk_size == LENGTH
        for tensor, entry in theirs.entries.items():
            assert np.array_equal(ours.entries[tensor].counts, entry.counts), tensor
            difference = np.abs(ours.entries[tensor].sums - entry.sums) / entry.sums
            assert difference.max() < tolerance, tensor


def convert_with_own_matrix(made: Case, directory: Path) -> tuple[Path, Path, tuple[str, ...]]:
    """The file that --imatrix auto makes, the matrix that it writes beside, and its notes."""
    directory.mkdir()
    spec = Spec("gguf", "IQ3_XXS").having({"imatrix": True})
    assert NativeGGUF().plan(made.checkpoint, spec).needs_calibration
    notes = NativeGGUF().convert(made.checkpoint, spec, made.calibration, directory).notes
    (file,) = (path for path in directory.iterdir() if path.name != IMATRIX)
    return file, directory / IMATRIX, notes


def assert_alike(ours: Path, theirs: Path, tolerance: float) -> None:
    """The same tensors, tokens that each of their matrices saw, and sums but for rounding."""
    found, expected = ImportanceMatrix.read(ours).entries, ImportanceMatrix.read(theirs).entries
    assert found.keys() == expected.keys()
    for tensor, entry in expected.items():
        assert np.array_equal(found[tensor].counts, entry.counts), tensor
        difference = np.abs(found[tensor].sums - entry.sums) / np.maximum(entry.sums, 1e-30)
        assert difference.max() < tolerance, tensor


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_gives_what_llama_imatrix_and_llama_quantize_give(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    known = CASES[name]
    if name == "gpt-2":
        known = replace(known, config=known.config | WIDE)
    path = make(known, tmp_path / "model")
    # Of many tokens one lies between two experts, so near that the last digits choose.
    made = case_of(path, tmp_path, TEXT[:900] if name == "qwen-3.5-moe-hub" else TEXT)
    ours, matrix, notes = convert_with_own_matrix(made, tmp_path / "ours")
    assert not any("saw no token" in note for note in notes)
    # ggml looks up the approximate GELU in a table of half precision; and what a recurrent state
    # has rounded stays in it.
    loose = ("gemma2", "gemma3_text", "gpt2", "gpt_neox", "qwen3_5_text", "qwen3_5_moe_text")
    assert_alike(matrix, made.theirs, 1e-3 if known.family in loose else 1e-4)
    monkeypatch.chdir(tmp_path / "ours")  # the file's name, as given, is in the metadata
    tool("llama-quantize", "--imatrix", IMATRIX, made.gguf, tmp_path / "theirs.q", "IQ3_XXS", 1)
    assert ours.read_bytes() == (tmp_path / "theirs.q").read_bytes()


def test_experts_that_no_token_reaches_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    path = make(CASES["mixtral-f16"], tmp_path / "model")
    made = case_of(path, tmp_path, "the " * 700)  # which are all routed alike
    _, matrix, notes = convert_with_own_matrix(made, tmp_path / "ours")
    # Of such a text a channel's sum may be that of one number near 0, so only tokens are compared.
    found, expected = (ImportanceMatrix.read(file).entries for file in (matrix, made.theirs))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name].counts, expected[name].counts) for name in expected)
    seen = np.stack([expected[f"blk.{block}.ffn_up_exps.weight"].counts for block in range(3)])
    unseen = int((seen == 0).sum())
    assert 0 < unseen < 33
    assert any(note.startswith(f"imatrix: {unseen} of 33 experts saw no token") for note in notes)


def test_a_file_of_llama_imatrix_is_written_again_byte_for_byte(
    llama: Case, experts: Case, tmp_path: Path
) -> None:
    for made in (llama, experts):
        ImportanceMatrix.read(made.theirs).write(tmp_path / "again.gguf")
        assert (tmp_path / "again.gguf").read_bytes() == made.theirs.read_bytes()


def test_the_old_format_weighs_as_the_new_one(llama: Case, tmp_path: Path) -> None:
    imatrix(llama.gguf, llama.text, tmp_path / "old.dat", "--output-format", "dat")
    new, old = ImportanceMatrix.read(llama.theirs), ImportanceMatrix.read(tmp_path / "old.dat")
    assert (old.datasets, old.chunks) == (new.datasets, new.chunks)
    assert old.entries.keys() == new.entries.keys()
    for tensor in new.entries:
        assert np.allclose(old.weights(tensor), new.weights(tensor), rtol=1e-6)


def quantized_alike(made: Case, scheme: str, matrix: Path, directory: Path) -> None:
    """Quantize by llama-quantize and by us, with the same matrix, into the same bytes."""
    theirs = directory / f"theirs-{scheme}.gguf"
    tool("llama-quantize", "--imatrix", matrix, made.gguf, theirs, scheme, 1)
    ours = directory / f"ours-{scheme}"
    ours.mkdir()
    spec = Spec("gguf", scheme).having({"imatrix": str(matrix)})
    NativeGGUF().convert(made.checkpoint, spec, None, ours)
    (file,) = ours.iterdir()
    assert file.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("scheme", ["Q2_K_S", "IQ2_XS", "Q4_K_M"])
def test_files_made_with_our_matrix_equal_llama_quantizes(
    llama: Case, tmp_path: Path, scheme: str
) -> None:
    matrix = tmp_path / "ours.gguf"
    compute(llama.checkpoint, llama.calibration).write(matrix)
    quantized_alike(llama, scheme, matrix, tmp_path)


def test_files_made_with_an_old_matrix_equal_llama_quantizes(llama: Case, tmp_path: Path) -> None:
    imatrix(llama.gguf, llama.text, tmp_path / "old.dat", "--output-format", "dat")
    quantized_alike(llama, "IQ2_XS", tmp_path / "old.dat", tmp_path)


def test_experts_weigh_apart_and_one_that_saw_nothing_evenly(experts: Case, tmp_path: Path) -> None:
    matrix = ImportanceMatrix.read(experts.theirs)
    stacks = [name for name in matrix.entries if "_exps." in name]
    assert len(stacks) == 6
    entries = dict(matrix.entries)
    for name in stacks:
        entry = matrix.entries[name]
        assert entry.sums.shape == (4, 256)
        assert not np.array_equal(entry.counts, entry.counts[:1].repeat(4))
        sums, counts = entry.sums.copy(), entry.counts.copy()
        sums[1], counts[1] = 0, 0
        entries[name] = InputSquares(sums, counts)
    replace(matrix, entries=entries).write(tmp_path / "partial.gguf")
    quantized_alike(experts, "IQ2_XS", experts.theirs, tmp_path)
    quantized_alike(experts, "Q2_K_S", tmp_path / "partial.gguf", tmp_path)
