"""GGUF files as sources: what we make of them equals what llama-quantize makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantkit import api
from quantkit.cli.spec_arguments import specs_of
from quantkit.errors import CheckpointError, ConversionError, RecipeError
from quantkit.formats.gguf.header import read_header
from quantkit.formats.gguf.imatrix import ImportanceMatrix, InputSquares
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.variant import Variant, read_manifest
from quantkit.runs.recipe import load_recipe
from tests.integration.gguf_oracle import convert, tool
from tests.models import make_checkpoint

MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}
NATIVE: dict[str, Any] = {"producer": None, "producer_args": ()}


def make(source: Path, scheme: str, out: Path, requantize: bool = False, **gguf: Any) -> Variant:
    specs = specs_of([f"gguf:{scheme}"], gguf=gguf, integers={}, compressed={}, producer=NATIVE)
    (variant,) = api.convert(source, specs, out, allow_requantize=requantize)
    return variant


def assert_as_llama_quantize(
    source: Path, scheme: str, directory: Path, *options: Any, requantize: bool = False, **gguf: Any
) -> Variant:
    theirs = directory / f"theirs-{scheme}.gguf"
    allow = ["--allow-requantize"] if requantize else []
    tool("llama-quantize", *allow, *options, source, theirs, scheme, 1)
    variant = make(source, scheme, directory / "ours", requantize, **gguf)
    assert variant.weights.read_bytes() == theirs.read_bytes()
    return variant


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the unquantized types, with rows that K-quants take and rows that they do not."""
    directory = tmp_path_factory.mktemp("sources")
    wide = Checkpoint.open(make_checkpoint(directory / "wide", dtype=torch.float32))
    narrow = make_checkpoint(
        directory / "narrow",
        family="qwen2",
        hidden_size=96,
        intermediate_size=160,
        tie_word_embeddings=False,
    )
    files = {t: convert(wide, t, directory / t) for t in ("F32", "F16", "BF16")}
    return files | {"narrow": convert(Checkpoint.open(narrow), "BF16", directory / "n")}


@pytest.fixture(scope="module")
def quantized(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Files that llama-quantize made, with an importance matrix where it asks for one."""
    directory = tmp_path_factory.mktemp("quantized")
    matrix = ImportanceMatrix(
        {
            tensor.name: InputSquares(np.ones((1, tensor.shape[1]), np.float32), np.float32([1]))
            for tensor in read_header(sources["F32"]).tensors
            if len(tensor.shape) == 2
        },
        ("none",),
        1,
        1,
    )
    matrix.write(directory / "imatrix.gguf")
    made = {}
    for scheme in ("Q8_0", "Q4_K_M", "Q5_1", "IQ4_XS", "IQ2_XS", "IQ1_M", "TQ1_0", "MXFP4_MOE"):
        made[scheme] = directory / f"model-{scheme}.gguf"
        options = ["--imatrix", directory / "imatrix.gguf"] if scheme in ("IQ2_XS", "IQ1_M") else []
        tool("llama-quantize", *options, sources["F32"], made[scheme], scheme, 1)
    return made


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "narrow"])
@pytest.mark.parametrize("scheme", ["Q4_K_M", "Q8_0", "F16", "BF16", "F32", "Q5_1"])
def test_unquantized_files(
    sources: dict[str, Path], tmp_path: Path, kind: str, scheme: str
) -> None:
    assert_as_llama_quantize(sources[kind], scheme, tmp_path)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M", "Q5_1", "IQ4_XS", "IQ2_XS", "IQ1_M", "TQ1_0"])
def test_quantized_files(quantized: dict[str, Path], tmp_path: Path, kind: str) -> None:
    variant = assert_as_llama_quantize(quantized[kind], "Q4_K_M", tmp_path, requantize=True)
    assert variant.manifest is not None
    (note,) = variant.manifest.notes
    assert note.startswith("made from weights that were quantized before")
    assert kind.removesuffix("_M") in note


@pytest.mark.parametrize("scheme", ["F16", "F32", "Q8_0", "Q2_K"])
def test_a_quantized_file_to_other_types(
    quantized: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    assert_as_llama_quantize(quantized["Q4_K_M"], scheme, tmp_path, requantize=True)


def test_experts_and_parts(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "moe", family="qwen3_moe", **MOE)
    whole = convert(Checkpoint.open(checkpoint), "BF16", tmp_path / "whole")
    tool("llama-gguf-split", "--split-max-tensors", 9, whole, tmp_path / "parts")
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 2
    variant = assert_as_llama_quantize(parts[0], "Q4_K_M", tmp_path)
    assert variant.weights.name == "parts-Q4_K_M.gguf"
    assert variant.manifest is not None
    assert variant.manifest.source.sha256.keys() == {part.name for part in parts}
    # And in parts again: llama-gguf-split's of llama-quantize's file.
    tool("llama-gguf-split", "--split-max-size", "1M", variant.weights, tmp_path / "theirs")
    ours = make(parts[0], "Q4_K_M", tmp_path / "split", split_max_size="1M")
    theirs = sorted(tmp_path.glob("theirs-0*.gguf"))
    assert len(theirs) > 1
    files = sorted(ours.path.glob("*.gguf"))
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in theirs]


def test_options_and_an_importance_matrix(
    sources: dict[str, Path], quantized: dict[str, Path], tmp_path: Path
) -> None:
    matrix = quantized["Q8_0"].with_name("imatrix.gguf")
    assert_as_llama_quantize(
        sources["F16"], "IQ2_XS", tmp_path, "--imatrix", matrix, "--tensor-type", "ffn_down=q6_k",
        "--output-tensor-type", "q5_k", "--token-embedding-type", "q4_0",
        imatrix=str(matrix), tensor_types=["ffn_down=Q6_K"], output_type="Q5_K",
        embedding_type="Q4_0",
    )  # fmt: skip


def test_tokenizer_files_beside_it_travel_and_it_may_be_a_variant(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    beside = tmp_path / "model"
    beside.mkdir()
    shutil.copy(sources["F16"], beside / "Tiny-3M.F16.gguf")
    shutil.copy(sources["F16"].parents[1] / "wide" / "tokenizer.json", beside)
    first = make(beside / "Tiny-3M.F16.gguf", "F32", tmp_path / "first")
    assert sorted(file.name for file in first.path.iterdir()) == [
        "Tiny-3M-F32.gguf", "quantkit.json", "tokenizer.json"
    ]  # fmt: skip
    second = make(first.path, "Q8_0", tmp_path / "second")
    manifest = read_manifest(second.path / "quantkit.json")
    assert manifest.source.id == "Tiny-3M-F32"
    assert manifest.notes == []
    assert (second.path / "tokenizer.json").is_file()


def test_what_is_made_of_the_checkpoint_only_is_refused(
    sources: dict[str, Path], quantized: dict[str, Path], tmp_path: Path
) -> None:
    def refused(source: Path, spec: str, **options: Any) -> str:
        specs = specs_of([spec], gguf=options, integers={}, compressed={}, producer=NATIVE)
        calibration = {"text": "pydoc:calibration"}
        with pytest.raises((ConversionError, CheckpointError, RecipeError)) as error:
            api.convert(source, specs, tmp_path / "out", calibration=calibration)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "quantized already (Q4_K, Q6_K)" in refused(quantized["Q4_K_M"], "gguf:Q8_0")
    for spec in ("gptq:w4g128", "awq:w4g64"):
        assert "is a GGUF, from which only other GGUF files" in refused(sources["F16"], spec)
    said = refused(sources["F16"], "gguf:IQ2_XS", imatrix="auto")
    assert "bring a file (--imatrix): llama-imatrix -m" in said
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(sources["F16"].read_bytes()[:-1000])
    assert "ends inside the data of" in refused(cut, "gguf:Q8_0")
    matrix = quantized["Q8_0"].with_name("imatrix.gguf")
    assert "is a GGUF of the type 'imatrix', not of a model" in refused(matrix, "gguf:Q8_0")


def test_a_run_needs_the_checkpoint(sources: dict[str, Path]) -> None:
    from quantkit.runs import pipeline

    recipe = load_recipe("quickstart", [f"source={json.dumps(str(sources['F16']))}"])
    with pytest.raises(CheckpointError, match="a GGUF is a source for `quantkit convert` only"):
        pipeline.plan(recipe)


def test_values_that_are_no_numbers_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    header = read_header(sources["F32"])
    spoilt = bytearray(sources["F32"].read_bytes())
    for name in ("blk.0.attn_q.weight", "output_norm.weight"):
        (tensor,) = (t for t in header.tensors if t.name == name)
        at = header.data_offset + tensor.offset
        bad = bytes(spoilt)
        bad = bad[: at + 40] + np.float32(np.nan).tobytes() + bad[at + 44 :]
        (tmp_path / "bad.gguf").write_bytes(bad)
        with pytest.raises(ConversionError, match=f"{name} holds NaN or infinity"):
            make(tmp_path / "bad.gguf", "Q8_0", tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []
