"""File types, plans, sizes and headers of GGUF files, against gguf, llama_cpp and the files."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import gguf
import llama_cpp
import pytest

from quantkit.errors import CheckpointError, ConversionError, RecipeError
from quantkit.formats.detect import open_variant
from quantkit.formats.gguf import GGUF, file_types
from quantkit.formats.gguf.header import read_header
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.native_gguf import NativeGGUF
from tests.models import make_checkpoint


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama of 96 and 160 columns, which no block of 256 divides, output layer not tied."""
    directory = tmp_path_factory.mktemp("models") / "narrow"
    return Checkpoint.open(
        make_checkpoint(directory, hidden_size=96, intermediate_size=160, tie_word_embeddings=False)
    )


def convert(checkpoint: Checkpoint, scheme: str, directory: Path) -> Path:
    directory.mkdir()
    NativeGGUF().convert(checkpoint, Spec("gguf", scheme), None, directory)
    (file,) = directory.iterdir()
    return file


def test_file_types_are_llama_cpps() -> None:
    prefixes = ("LLAMA_FTYPE_ALL_", "LLAMA_FTYPE_MOSTLY_")
    theirs = {
        name.removeprefix(prefix): getattr(llama_cpp, name)
        for name in dir(llama_cpp)
        for prefix in prefixes
        if name.startswith(prefix)
    }
    # llama-cpp-python keeps names of types that llama.cpp has removed.
    assert {k: v for k, v in theirs.items() if k in file_types.FILE_TYPES} == {
        k: v for k, v in file_types.FILE_TYPES.items() if k in theirs
    }
    members = {m.name.partition("_")[2]: int(m) for m in gguf.LlamaFileType}
    assert {k: v for k, v in file_types.FILE_TYPES.items() if k != "Q2_0"} == {
        k: v for k, v in members.items() if k
    }


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("q4_k_m", "unknown scheme 'q4_k_m'; gguf takes F32, .*did you mean 'Q4_K_M'"),
        ("Q4_K", "did you mean 'Q4_K_[MS]'"),
        ("w4g64", "unknown scheme 'w4g64'"),
        ("NVFP4", "llama.cpp does not quantize whole files to NVFP4"),
        ("IQ2_XXS", "blk.0.attn_k.weight IQ2_XXS, which needs an importance matrix"),
    ],
)
def test_unknown_schemes_are_refused(tiny_llama: Path, scheme: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        NativeGGUF().plan(Checkpoint.open(tiny_llama), Spec("gguf", scheme))


@pytest.mark.parametrize("scheme", ["F32", "F16", "Q8_0", "Q4_K_M", "Q2_K", "IQ4_XS", "TQ1_0"])
def test_the_plan_is_exact_and_reads_no_weights(
    narrow: Checkpoint,
    tiny_qwen2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    for checkpoint in (narrow, Checkpoint.open(tiny_qwen2)):
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoint, "read", lambda *_: pytest.fail("the plan read weights"))
            plan = NativeGGUF().plan(checkpoint, Spec("gguf", scheme))
        file = convert(checkpoint, scheme, tmp_path / checkpoint.id)
        assert plan.bytes == file.stat().st_size
        read = gguf.GGUFReader(file)
        stored = sum(int(tensor.n_bytes) for tensor in read.tensors)
        assert plan.bits_per_weight == stored * 8 / checkpoint.parameters
        assert open_variant(file).scheme == scheme


def test_fallbacks_are_named_once_a_kind(narrow: Checkpoint, tmp_path: Path) -> None:
    plan = NativeGGUF().plan(narrow, Spec("gguf", "Q4_K_S"))
    read = gguf.GGUFReader(convert(narrow, "Q4_K_S", tmp_path / "out"))
    types = {tensor.name: tensor.tensor_type.name for tensor in read.tensors}
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["blk.1.ffn_down.weight"] == "Q5_0"
    assert types["output.weight"] == "Q8_0"
    assert set(plan.notes) == {
        # llama.cpp gives the first layers' values Q5_K in this mix.
        "blk.*.attn_v.weight (2 tensors): Q5_1 instead of Q5_K, 96 columns do not divide by 256",
        "blk.*.{attn_k,attn_output,attn_q,ffn_gate,ffn_up}.weight (10 tensors): "
        "Q5_0 instead of Q4_K, 96 columns do not divide by 256",
        "blk.*.ffn_down.weight (2 tensors): Q5_0 instead of Q4_K, 160 columns do not divide by 256",
        "token_embd.weight (1 tensor): Q5_0 instead of Q4_K, 96 columns do not divide by 256",
        "output.weight (1 tensor): Q8_0 instead of Q6_K, 96 columns do not divide by 256",
    }


def test_no_fallbacks_where_rows_divide(tiny_llama: Path) -> None:
    assert NativeGGUF().plan(Checkpoint.open(tiny_llama), Spec("gguf", "Q4_K_M")).notes == ()


def test_a_sliding_window_is_noted(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "mistral", family="mistral", sliding_window=512)
    (note,) = NativeGGUF().plan(Checkpoint.open(directory), Spec("gguf", "BF16")).notes
    assert "not to a sliding window of 512 tokens" in note


def test_bits_per_weight_of_the_blocks(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    for scheme, bits in (("Q4_0", 4.5), ("Q8_0", 8.5), ("BF16", None)):
        out = tmp_path / scheme
        out.mkdir()
        made = NativeGGUF().convert(checkpoint, Spec("gguf", scheme), None, out)
        assert made.bits_per_weight_quantized == bits
        assert [file.name for file in out.iterdir()] == [f"tiny-llama-{scheme}.gguf"]
        assert set(made.tools) == {"llama-cpp-python", "gguf"}


def test_the_header_is_what_the_gguf_package_reads(tiny_qwen2: Path, tmp_path: Path) -> None:
    file = convert(Checkpoint.open(tiny_qwen2), "Q4_0", tmp_path / "out")
    ours, theirs = read_header(file), gguf.GGUFReader(file)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == fields
    assert ours.data_offset == theirs.data_offset
    assert [(t.name, t.type, t.offset + ours.data_offset) for t in ours.tensors] == [
        (t.name, int(t.tensor_type), t.data_offset) for t in theirs.tensors
    ]
    assert [t.shape for t in ours.tensors] == [tuple(reversed(t.shape)) for t in theirs.tensors]


def test_what_is_not_a_gguf_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    whole = convert(Checkpoint.open(tiny_llama), "Q8_0", tmp_path / "out").read_bytes()
    for bad in (b"", b"GGML" + whole[4:], whole[:1000], whole[:10]):
        file = tmp_path / "bad.gguf"
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"bad\.gguf: (truncated|not a) GGUF"):
            open_variant(file)


def test_inspect_describes_the_file(tiny_qwen2: Path, tmp_path: Path) -> None:
    file = convert(Checkpoint.open(tiny_qwen2), "Q4_K_M", tmp_path / "out")
    facts = GGUF().inspect(Variant("x", file, "gguf", "Q4_K_M", None))
    assert facts["architecture"] == "qwen2"
    assert facts["file_type"] == "Q4_K_M"
    assert facts["parameters"] == Checkpoint.open(tiny_qwen2).parameters
    assert facts["context_length"] == 2048
    assert (facts["tokenizer"], facts["pre_tokenizer"]) == ("gpt2", "smollm")
    assert facts["vocabulary"] == 1024
    assert facts["chat_template"] is True
    assert facts["tensors"] == 27
    # Q6_K for the second layer's attn_v and ffn_down and for the output layer; F32 for 5 norms
    # and 6 biases.
    counts = {kind: entry["tensors"] for kind, entry in facts["tensor_types"].items()}
    assert counts == {"F32": 11, "Q4_K": 13, "Q6_K": 3}
    assert facts["tensor_types"]["Q4_K"]["bytes"] % 144 == 0


def test_a_full_disk_is_told_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 2**20))
    with pytest.raises(
        ConversionError, match=r"0\.00 GiB free, and the conversion takes 0\.00 GiB"
    ):
        NativeGGUF().convert(Checkpoint.open(tiny_llama), Spec("gguf", "Q8_0"), None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_is_a_conversion_error(tiny_llama: Path, tmp_path: Path) -> None:
    # A limit on the size of files fails writes as a full disk does.
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from quantkit.models.checkpoint import Checkpoint\n"
        "from quantkit.producers.native_gguf import NativeGGUF\n"
        "from quantkit.models.spec import Spec\n"
        "checkpoint = Checkpoint.open(sys.argv[1]); spec = Spec('gguf', 'Q8_0')\n"
        "NativeGGUF().plan(checkpoint, spec)  # writes a file, and is not done again\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "NativeGGUF().convert(checkpoint, spec, None, Path(sys.argv[2]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_llama, tmp_path], capture_output=True, text=True
    )
    assert "ConversionError: gguf: writing tiny-llama-Q8_0.gguf failed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_llama_cpps_reason_is_in_the_error(narrow: Checkpoint) -> None:
    with pytest.raises(ConversionError, match="cannot quantize this to Q1_0: no tensor type fall"):
        NativeGGUF().plan(narrow, Spec("gguf", "Q1_0"))
