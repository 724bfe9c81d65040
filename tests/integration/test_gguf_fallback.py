"""Architectures that quantkit leaves to llama.cpp's own converter, which it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest
import torch

from quantkit.engines.llamacpp.vocabulary import Vocabulary
from quantkit.errors import ConversionError, ToolchainError
from quantkit.formats import format_of
from quantkit.formats.gguf.header import read_header
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers import convert as conversion
from quantkit.producers.gguf import converter_launcher, fallback, llama_cpp_converter
from quantkit.producers.native_gguf import NativeGGUF
from tests.gguf_tokenizers import DIGITS, write_byte_level
from tests.integration.gguf_oracle import loaded, oracle
from tests.models import make_checkpoint


@pytest.fixture
def source(llama_cpp_source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTKIT_LLAMA_CPP", str(llama_cpp_source))
    return llama_cpp_source


@pytest.fixture
def starcoder(llama_cpp_source: Path, tmp_path: Path) -> Checkpoint:
    """A class of model that quantkit does not convert, with a tokenizer that llama.cpp knows."""
    directory = make_checkpoint(
        tmp_path / "Starcoder2-tiny",
        family="starcoder2",
        vocab_size=49152,
        bos_token_id=0,
        eos_token_id=0,
    )
    vocabulary = llama_cpp_source / "models" / "ggml-vocab-starcoder.gguf"
    end = "<|endoftext|>"
    write_byte_level(vocabulary, directory, DIGITS, bos_token=end, eos_token=end)
    return Checkpoint.open(directory)


def test_the_converters_file_and_what_is_made_of_it(
    starcoder: Checkpoint, source: Path, tmp_path: Path
) -> None:
    converter = llama_cpp_converter.available()
    assert converter is not None
    (tmp_path / "ours").mkdir()
    ours = fallback.unquantized(starcoder, converter, tmp_path / "ours")
    assert ours.name == "Starcoder2-tiny-BF16.gguf"
    theirs = tmp_path / "theirs.gguf"
    oracle(source, [(starcoder.path, "BF16", theirs)])
    assert ours.read_bytes() == theirs.read_bytes()

    packages = Path(llama_cpp.__file__).parents[1]
    specs = [Spec("gguf", "Q4_K_M"), Spec("gguf", "Q8_0")]
    plans = {spec: NativeGGUF().plan(starcoder, spec) for spec in specs}
    made = conversion.convert_many(starcoder, specs, None, tmp_path / "variants")
    for spec in specs:
        variant = made[spec]
        assert not isinstance(variant, Exception)
        expected = tmp_path / f"{spec.scheme}.gguf"
        subprocess.run(
            [packages / "bin" / "llama-quantize", theirs, expected, spec.scheme],
            env={**os.environ, "LD_LIBRARY_PATH": str(packages / "lib")},
            check=True,
            capture_output=True,
        )
        assert variant.weights.name == f"Starcoder2-tiny-{spec.scheme}.gguf"
        assert variant.weights.read_bytes() == expected.read_bytes()
        assert variant.weights.stat().st_size == plans[spec].bytes
        manifest = variant.manifest
        assert manifest.spec["converter"] == f"llama.cpp ({converter.version})"
        assert manifest.tools["convert_hf_to_gguf.py"] == converter.version
        assert manifest.bits_per_weight == pytest.approx(plans[spec].bits_per_weight)
        assert "llama.cpp's own converter" in manifest.notes[0]
        kept = {file.name for file in variant.path.iterdir()}
        assert kept == {*manifest.files, "quantkit.json"}
    with loaded(tmp_path / "Q8_0.gguf", n_ctx=32) as model:
        assert model("def", max_tokens=2, temperature=0.0)["choices"]


def test_the_template_and_the_ends_are_not_the_converters(
    starcoder: Checkpoint, source: Path, tmp_path: Path
) -> None:
    """It takes the older template, and one end."""
    named = starcoder.path / "additional_chat_templates"
    named.mkdir()
    templates = {"default": "new {{ messages }}", "rag": "rag {{ messages }}"}
    (starcoder.path / "chat_template.jinja").write_text(templates["default"])
    (named / "rag.jinja").write_text(templates["rag"])
    ends = {"eos_token_id": [0, 40000]}
    (starcoder.path / "generation_config.json").write_text(json.dumps(ends))
    spec = Spec("gguf", "Q8_0")
    planned = NativeGGUF().plan(starcoder, spec)
    variant = conversion.convert(starcoder, spec, None, tmp_path / "variants")
    assert format_of(variant).chat_templates(variant) == templates
    assert variant.weights.stat().st_size == planned.bytes
    with Vocabulary(variant.weights) as vocabulary:
        assert vocabulary.is_end(40000)


def test_planning_reads_no_weights(starcoder: Checkpoint, source: Path, tmp_path: Path) -> None:
    weights = starcoder.path / "model.safetensors"
    plan = NativeGGUF().plan(starcoder, Spec("gguf", "BF16"))
    data = weights.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    weights.write_bytes(data[:head] + b"\xff" * (len(data) - head))  # no number in it
    again = Checkpoint.open(starcoder.path)
    assert NativeGGUF().plan(again, Spec("gguf", "BF16")).bytes == plan.bytes


def test_without_a_converter_the_way_to_one_is_named(
    starcoder: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUANTKIT_LLAMA_CPP", raising=False)
    monkeypatch.setattr("quantkit.toolchains.llama_cpp_source.built_in", lambda: None)
    with pytest.raises(ConversionError, match=r"get it: quantkit engines install llamacpp-conv"):
        NativeGGUF().plan(starcoder, Spec("gguf", "Q8_0"))
    monkeypatch.setenv("QUANTKIT_LLAMA_CPP", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"no convert_hf_to_gguf\.py there"):
        NativeGGUF().plan(starcoder, Spec("gguf", "Q8_0"))


def test_what_llama_cpp_refuses_is_told_in_a_line(starcoder: Checkpoint, source: Path) -> None:
    config = json.loads((starcoder.path / "config.json").read_text())
    (starcoder.path / "config.json").write_text(json.dumps(config | {"architectures": ["NoLM"]}))
    with pytest.raises(ConversionError) as caught:
        NativeGGUF().plan(Checkpoint.open(starcoder.path), Spec("gguf", "Q8_0"))
    assert "refused it: Model NoLM is not supported; its output is in" in str(caught.value)
    assert "\n" not in str(caught.value)
    quantized = config | {"architectures": ["NoLM"], "quantization_config": {"quant_method": "awq"}}
    (starcoder.path / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(ConversionError, match="quantized already"):
        NativeGGUF().plan(Checkpoint.open(starcoder.path), Spec("gguf", "Q8_0"))


CONVERTER = """
import sys, torch
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
what, directory = sys.argv[1:]
if what == "config":
    AutoConfig.from_pretrained(directory, trust_remote_code=True)
elif what == "tokenizer":
    AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
elif what == "class":
    get_class_from_dynamic_module("evil.Evil", directory)
elif what == "pickle":
    torch.load(directory + "/pytorch_model.bin")
else:
    print("ran", what, AutoTokenizer.from_pretrained(directory, trust_remote_code=True)("a"))
"""


@pytest.mark.parametrize("what", ["config", "tokenizer", "class", "pickle", "nothing bad"])
def test_nothing_of_a_checkpoint_is_executed(what: str, tmp_path: Path) -> None:
    converter, directory = tmp_path / "llama.cpp", tmp_path / "model"
    converter.mkdir()
    (converter / "convert_hf_to_gguf.py").write_text(CONVERTER)
    make_checkpoint(directory, num_hidden_layers=1, hidden_size=64)
    trace = tmp_path / "executed"
    (directory / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    torch.save({"weight": torch.ones(1)}, directory / "pytorch_model.bin")
    auto = {
        "config": ("config.json", {"AutoConfig": "evil.Evil"}),
        "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    }
    if what in auto:
        name, classes = auto[what]
        settings = json.loads((directory / name).read_text())
        settings |= {"auto_map": classes, "model_type": "evil", "tokenizer_class": "Evil"}
        (directory / name).write_text(json.dumps(settings))
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            converter_launcher.__file__,
            converter,
            "whole",
            "",
            what,
            directory,
        ],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert not trace.exists()
    assert (done.returncode == 0) == (what == "nothing bad"), done.stderr
    assert ("ran nothing bad" in done.stdout) == (what == "nothing bad")


def test_the_head_alone_is_the_whole_but_for_the_data(
    starcoder: Checkpoint, source: Path, tmp_path: Path
) -> None:
    converter = llama_cpp_converter.available()
    assert converter is not None
    content = fallback.content(starcoder, converter)
    (tmp_path / "whole").mkdir()
    path = fallback.unquantized(starcoder, converter, tmp_path / "whole")
    assert content.metadata() == read_header(path).stored
    assert [t.name for t in content.tensors] == [t.name for t in read_header(path).tensors]
