"""Every file type and option against ``llama-quantize``: the same bytes, from the checkpoint."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch

from quantkit.data.calibration import calibrate
from quantkit.data.texts import load_text
from quantkit.errors import ConversionError
from quantkit.formats.gguf.file_types import OFFERED, UNQUANTIZED
from quantkit.formats.gguf.header import read_header
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import IMATRIX
from quantkit.producers.native_gguf import NativeGGUF
from tests.integration.gguf_oracle import convert, oracle
from tests.models import make_checkpoint

PACKAGES = Path(llama_cpp.__file__).parents[1]
QUANTIZED = [scheme for scheme in OFFERED if scheme not in UNQUANTIZED]
REFUSED = {"narrow": {"Q1_0"}}
"""llama.cpp has no smaller block for rows of 96 to fall back to."""


def tool(name: str, *arguments: Any) -> None:
    """Run one of llama.cpp's own programs."""
    program = PACKAGES / "bin" / name
    if not program.is_file():
        pytest.skip(f"{program}: llama-cpp-python was built without its tools")
    done = subprocess.run(
        [program, *map(str, arguments)],
        env={**os.environ, "LD_LIBRARY_PATH": str(PACKAGES / "lib")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-1000:]


@dataclass(frozen=True)
class Model:
    """A checkpoint, and what llama.cpp's tools start from: its BF16 file and importance matrix."""

    checkpoint: Checkpoint
    base: Path
    imatrix: Path

    def ours(self, scheme: str, out: Path, **options: Any) -> list[Path]:
        """The files that we make."""
        out.mkdir()
        spec = Spec("gguf", scheme).having(options)
        NativeGGUF().convert(self.checkpoint, spec, None, out)
        return sorted(out.iterdir())

    def theirs(self, scheme: str, out: Path, *flags: Any) -> Path:
        """The file that ``llama-quantize`` makes."""
        tool("llama-quantize", *flags, self.base, out, scheme, 2)
        return out


CONFIGS: dict[str, dict[str, Any]] = {
    "wide": {"intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "narrow": {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 16,  # the mixes treat the first and the last eighth better
        "tie_word_embeddings": False,
    },
    "experts": {
        "family": "qwen3_moe",
        "num_experts": 8,  # a number of which llama.cpp's mixes take note
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "head_dim": 64,
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp(request.param)
    made = make_checkpoint(directory / request.param, **CONFIGS[request.param])
    base = convert(Checkpoint.open(made), "BF16", directory / "base")
    text = directory / "text"
    text.write_text(load_text("pydoc:calibration").text[:8000])
    imatrix = directory / "imatrix.gguf"
    tool("llama-imatrix", "-m", base, "-f", text, "-o", imatrix, "-c", 128, "--chunks", 8, "-t", 2)
    return Model(Checkpoint.open(made), base, imatrix)


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "imatrix"])
def test_every_type_at_once_equals_llama_quantizes(
    model: Model, tmp_path: Path, weighed: bool
) -> None:
    options = {"imatrix": str(model.imatrix)} if weighed else {}
    flags = ["--imatrix", model.imatrix] if weighed else []
    targets = {}
    # llama.cpp builds tables for these anew in each process, for up to 12 s: once is enough.
    slow = ("IQ1", "IQ2") if weighed and model.checkpoint.id == "wide" else ()
    for scheme in QUANTIZED:
        if scheme.startswith(slow):
            continue
        spec = Spec("gguf", scheme).having(options)
        targets[spec] = tmp_path / scheme
        targets[spec].mkdir()
    made = NativeGGUF().convert_many(model.checkpoint, targets, None)
    refused = {spec.scheme for spec, result in made.items() if isinstance(result, Exception)}
    if weighed:
        assert refused == REFUSED.get(model.checkpoint.id, set())
    for spec, out in targets.items():
        if spec.scheme in refused:
            with pytest.raises(AssertionError, match="failed to quantize"):
                model.theirs(spec.scheme, tmp_path / "theirs.gguf", *flags)
            assert list(out.iterdir()) == []
            continue
        (ours,) = out.iterdir()
        theirs = model.theirs(spec.scheme, tmp_path / "theirs.gguf", *flags)
        assert ours.read_bytes() == theirs.read_bytes(), spec


@pytest.mark.parametrize(
    ("scheme", "options", "flags"),
    [
        ("Q4_K_M", {"pure": True}, ["--pure"]),
        ("IQ4_XS", {"pure": True}, ["--pure"]),
        ("Q4_K_M", {"output_type": "q8_0"}, ["--output-tensor-type", "q8_0"]),
        ("Q8_0", {"embedding_type": "Q5_0"}, ["--token-embedding-type", "q5_0"]),
        (
            "Q6_K",
            {"output_type": "F16", "embedding_type": "BF16", "pure": True},
            ["--output-tensor-type", "f16", "--token-embedding-type", "bf16", "--pure"],
        ),
        ("F16", {"embedding_type": "Q8_0"}, ["--token-embedding-type", "q8_0"]),
        ("BF16", {"output_type": "Q8_0"}, ["--output-tensor-type", "q8_0"]),
        ("Q4_K_S", {"tensor_types": {"ffn_down": "Q6_K"}}, ["--tensor-type", "ffn_down=q6_k"]),
        (
            "Q5_K_M",
            {"tensor_types": {r"blk\.[1-9]\.Attn_[kv]": "F16", "attn": "Q4_0", "ffn_up": "F32"}},
            [
                "--tensor-type", r"blk\.[1-9]\.Attn_[kv]=f16", "--tensor-type", "attn=q4_0",
                "--tensor-type", "ffn_up=f32",
            ],
        ),
        (
            "Q4_0", {"tensor_types": {"ffn_(up|gate)": "MXFP4"}},
            ["--tensor-type", "ffn_(up|gate)=mxfp4"],
        ),
        (
            "Q2_K", {"tensor_types": {"not.there": "Q8_0"}},
            ["--tensor-type", "not.there=q8_0"],
        ),
    ],
)  # fmt: skip
def test_options_equal_llama_quantizes(
    model: Model, tmp_path: Path, scheme: str, options: dict[str, Any], flags: list[str]
) -> None:
    (ours,) = model.ours(scheme, tmp_path / "ours", **options)
    theirs = model.theirs(scheme, tmp_path / "theirs.gguf", *flags)
    assert ours.read_bytes() == theirs.read_bytes()
    plan = NativeGGUF().plan(model.checkpoint, Spec("gguf", scheme).having(options))
    assert plan.bytes == theirs.stat().st_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_precisions_equal_llama_quantizes(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", dtype=dtype, shards=3))
    base = convert(checkpoint, str(dtype).replace("torch.float", "F"), tmp_path / "base")
    model = Model(checkpoint, base, tmp_path)
    for scheme in ("Q8_0", "Q4_K_M", "IQ4_NL"):
        (ours,) = model.ours(scheme, tmp_path / scheme)
        theirs = model.theirs(scheme, tmp_path / "theirs.gguf")
        assert ours.read_bytes() == theirs.read_bytes(), scheme


def test_a_computed_matrix_is_written_beside_and_gives_llama_quantizes_file(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = load_text("pydoc:calibration")
    tokenizer = model.checkpoint.tokenizer
    calibration = calibrate(text, tokenizer, samples=4, sequence_length=64, seed=0)
    spec = Spec("gguf", "IQ2_XS").having({"imatrix": True})
    assert NativeGGUF().plan(model.checkpoint, spec).needs_calibration
    (out := tmp_path / "ours").mkdir()
    NativeGGUF().convert(model.checkpoint, spec, calibration, out)
    monkeypatch.chdir(out)  # the file's name, as given, is in the metadata
    theirs = model.theirs("IQ2_XS", tmp_path / "theirs.gguf", "--imatrix", IMATRIX)
    (ours,) = (path for path in out.iterdir() if path.name != IMATRIX)
    assert ours.read_bytes() == theirs.read_bytes()
    metadata = read_header(ours).metadata
    assert metadata["quantize.imatrix.file"] == IMATRIX
    assert metadata["quantize.imatrix.dataset"] == text.dataset


def test_a_matrix_of_another_model_is_refused(model: Model, tmp_path: Path) -> None:
    other = Checkpoint.open(make_checkpoint(tmp_path / "other", hidden_size=128))
    spec = Spec("gguf", "Q4_K_M").having({"imatrix": str(model.imatrix)})
    with pytest.raises(ConversionError, match=r"which has (128|512) columns: it was made from"):
        NativeGGUF().plan(other, spec)


def test_parts_equal_llama_gguf_splits(model: Model, tmp_path: Path) -> None:
    if model.checkpoint.id == "narrow":
        pytest.skip("less than 1 MB, and llama-gguf-split takes no smaller size")
    ours = model.ours("Q8_0", tmp_path / "ours", split_max_size="1M")
    whole = model.theirs("Q8_0", tmp_path / "whole.gguf")
    (tmp_path / "theirs").mkdir()
    stem = ours[0].name.partition("-0000")[0]
    tool("llama-gguf-split", "--split", "--split-max-size", "1M", whole, tmp_path / "theirs" / stem)
    theirs = sorted((tmp_path / "theirs").iterdir())
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert len(ours) > 1
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.read_bytes() == other.read_bytes()
    spec = Spec("gguf", "Q8_0").having({"split_max_size": "1M"})
    assert NativeGGUF().plan(model.checkpoint, spec).bytes == sum(
        path.stat().st_size for path in ours
    )


def test_unquantized_parts_equal_the_converters(
    llama_cpp_source: Path, model: Model, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    ours = model.ours("F16", tmp_path / "ours", split_max_size="200K")
    job = (model.checkpoint.path, "F16", tmp_path / "theirs" / f"{model.checkpoint.id}-F16.gguf")
    oracle(llama_cpp_source, [job], "--split-max-size", "200K", tokenizer=False)
    theirs = sorted((tmp_path / "theirs").iterdir())
    assert [path.name for path in ours] == [path.name for path in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        a, b = read_header(mine), read_header(other)
        keys = [key for key in a.metadata if not key.startswith("tokenizer.")]
        assert keys == list(b.metadata)
        assert [a.metadata[key] for key in keys] == list(b.metadata.values())
        assert a.tensors == b.tensors
        assert mine.read_bytes()[a.data_offset :] == other.read_bytes()[b.data_offset :]


def test_llama_cpp_loads_the_parts(tmp_path: Path, tiny_llama: Path) -> None:
    out = tmp_path / "parts"
    out.mkdir()
    spec = Spec("gguf", "Q8_0").having({"split_max_size": "500K"})
    NativeGGUF().convert(Checkpoint.open(tiny_llama), spec, None, out)
    first, *others = sorted(out.iterdir())
    assert others
    loaded = llama_cpp.Llama(str(first), verbose=False, n_ctx=32)
    assert loaded.tokenize(b"a word")
    loaded.close()
