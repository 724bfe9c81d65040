"""Our GGUF files against llama.cpp's own converter and quantizer, and in llama.cpp itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch

from quantkit.models.checkpoint import Checkpoint
from tests import gguf_tokenizers
from tests.gguf_families import FAMILIES
from tests.integration.gguf_oracle import assert_same_gguf, convert, loaded, oracle
from tests.models import make_checkpoint

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
AWKWARD = [
    "Hello world",
    " leading space, and  two  spaces ",
    "\n\n\ttabs\r\nand newlines\n",
    "3.14159 1000000 12,345 007 x2y",
    "naïve café — “quotes” … 你好，世界 नमस्ते 🚀👩‍🚀",  # noqa: RUF001
    "I'm you'Re WE'LL don't",
    "def f(x):\n    return x**2  # comment\n",
    "a<|endoftext|>b",
    "",
]


@pytest.fixture(scope="session")
def demo_gguf(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model as F32 and the quickstart's types."""
    return {
        scheme: convert(demo, scheme, tmp_path_factory.mktemp(scheme))
        for scheme in ("F32", "BF16", "Q8_0", "Q4_K_M", "Q4_0")
    }


def smollm(demo: Checkpoint, directory: Path, **config: Any) -> Path:
    """A tiny Llama with SmolLM2's tokenizer."""
    make_checkpoint(directory, **SMALL, vocab_size=49152, **config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.path / name, directory)
    return directory


def test_the_demo_model_equals_the_converters(
    demo: Checkpoint, demo_gguf: dict[str, Path], llama_cpp_source: Path, tmp_path: Path
) -> None:
    oracle(llama_cpp_source, [(demo.path, "BF16", tmp_path / "theirs.gguf")])
    assert_same_gguf(demo_gguf["BF16"], tmp_path / "theirs.gguf")


def test_tiny_llamas_equal_the_converters(
    demo: Checkpoint, llama_cpp_source: Path, tmp_path: Path
) -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    cases: list[tuple[torch.dtype, str, dict[str, Any]]] = [
        (torch.float32, "F32", {"tie_word_embeddings": False}),
        (torch.float32, "F16", {"shards": 3}),
        (torch.float32, "BF16", {"attention_bias": True, "mlp_bias": True}),
        (torch.float16, "F16", {"num_key_value_heads": 4}),
        (torch.float16, "BF16", {"head_dim": 32}),
        (torch.bfloat16, "F16", {"rope_parameters": LLAMA_3_ROPE}),
        (torch.bfloat16, "F32", {"rope_parameters": linear}),
    ]
    jobs = []
    for index, (dtype, scheme, config) in enumerate(cases):
        directory = smollm(demo, tmp_path / str(index) / "Tiny-3M-Chat", dtype=dtype, **config)
        jobs.append((directory, scheme, tmp_path / f"{index}.gguf"))
    oracle(llama_cpp_source, jobs)
    for directory, scheme, theirs in jobs:
        ours = convert(Checkpoint.open(directory), scheme, directory.with_name("ours"))
        assert_same_gguf(ours, theirs)


def test_llama_3_equals_the_converters_and_tokenizes_alike(
    llama_cpp_source: Path, tmp_path: Path
) -> None:
    directory = make_checkpoint(
        tmp_path / "Llama-3.2-tiny",
        **SMALL,
        vocab_size=128256,
        rope_parameters=LLAMA_3_ROPE,
        tie_word_embeddings=False,
        bos_token_id=128000,
        eos_token_id=[128001, 128009],
    )
    assert FAMILIES["Llama-3.1"].write(llama_cpp_source / "models", directory) == 128256
    (directory / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1})
    )
    check_family(Checkpoint.open(directory), llama_cpp_source, tmp_path)


def test_qwen2_equals_the_converters_and_tokenizes_alike(
    llama_cpp_source: Path, tmp_path: Path
) -> None:
    directory = make_checkpoint(
        tmp_path / "Qwen2.5-tiny",
        family="qwen2",
        shards=2,
        **SMALL,
        vocab_size=152064,  # more rows than tokens, as the real ones have
        bos_token_id=151643,
        eos_token_id=151645,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "rope_theta": 1e6,
        },
    )
    FAMILIES["Qwen2.5"].write(llama_cpp_source / "models", directory)
    (directory / "chat_template.jinja").write_text(gguf_tokenizers.CHAT_TEMPLATE)
    check_family(Checkpoint.open(directory), llama_cpp_source, tmp_path)


def test_mistral_with_sentencepiece_equals_the_converters_and_tokenizes_alike(
    llama_cpp_source: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sentencepiece")
    directory = make_checkpoint(tmp_path / "mistral", family="mistral", **SMALL, vocab_size=1008)
    gguf_tokenizers.write_sentencepiece(directory)
    (directory / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\n---\n# A model\n")
    check_family(Checkpoint.open(directory), llama_cpp_source, tmp_path)


def check_family(checkpoint: Checkpoint, source: Path, tmp_path: Path) -> None:
    ours = convert(checkpoint, "BF16", tmp_path / "ours")
    oracle(source, [(checkpoint.path, "BF16", tmp_path / "theirs.gguf")])
    assert_same_gguf(ours, tmp_path / "theirs.gguf")
    assert_same_tokens(checkpoint, ours)


def assert_same_tokens(checkpoint: Checkpoint, gguf: Path) -> None:
    with loaded(gguf, vocab_only=True) as model:
        for text in AWKWARD:
            expected = checkpoint.tokenizer(text).input_ids
            assert model.tokenize(text.encode(), add_bos=True, special=True) == expected, text


def test_a_tokenizer_json_of_sentencepiece_tokenizes_as_transformers_does(
    tmp_path: Path,
) -> None:
    # llama.cpp's converter is no oracle here: without tokenizer.model it gives all tokens one
    # score, and llama.cpp then merges from the left.
    pytest.importorskip("sentencepiece")
    directory = make_checkpoint(tmp_path / "llama-2", **SMALL, vocab_size=1000)
    gguf_tokenizers.write_sentencepiece(directory, keep_model=False)
    checkpoint = Checkpoint.open(directory)
    assert_same_tokens(checkpoint, convert(checkpoint, "BF16", tmp_path / "ours"))


def test_smollm2_tokenizes_as_transformers_does(
    demo: Checkpoint, demo_gguf: dict[str, Path]
) -> None:
    assert_same_tokens(demo, demo_gguf["BF16"])


@pytest.mark.parametrize("scheme", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_quantized_files_equal_llama_quantizes(
    demo_gguf: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    packages = Path(llama_cpp.__file__).parents[1]
    tool = packages / "bin" / "llama-quantize"
    if not tool.is_file():
        pytest.skip(f"{tool}: llama-cpp-python was built without its tools")
    subprocess.run(
        [tool, demo_gguf["BF16"], tmp_path / "theirs.gguf", scheme],
        env={**os.environ, "LD_LIBRARY_PATH": str(packages / "lib")},
        check=True,
        capture_output=True,
    )
    assert demo_gguf[scheme].read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_f32_in_llama_cpp_gives_the_logits_of_transformers(
    demo: Checkpoint, demo_gguf: dict[str, Path]
) -> None:
    from transformers import AutoModelForCausalLM

    text = "The capital of France is Paris. In 1789, the people of the city took the Bastille."
    ids = demo.tokenizer(text).input_ids
    reference = AutoModelForCausalLM.from_pretrained(demo.path, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    with loaded(demo_gguf["F32"], n_ctx=128, logits_all=True, type_k=0, type_v=0) as model:
        model.eval(ids)
        found = torch.tensor(np.array(model.scores[: len(ids)])).log_softmax(-1)
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize("scheme", ["BF16", "Q8_0", "Q4_K_M", "Q4_0"])
def test_the_demo_model_knows_the_capital_of_france(
    demo_gguf: dict[str, Path], scheme: str
) -> None:
    with loaded(demo_gguf[scheme], n_ctx=64) as model:
        answer = model("The capital of France is", max_tokens=4, temperature=0.0)
    assert "Paris" in answer["choices"][0]["text"]
