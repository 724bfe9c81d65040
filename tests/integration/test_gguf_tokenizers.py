"""The vocabularies in our GGUF files against llama.cpp's own converter, and in llama.cpp itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from quantkit.formats.gguf.header import read_header
from quantkit.models.checkpoint import Checkpoint
from quantkit.producers.gguf import pretokenizers
from quantkit.producers.gguf.tokenizer import read_tokenizer
from quantkit.producers.proof.tokens import compare_gguf
from tests.gguf_families import FAMILIES, write_checkpoint
from tests.gguf_tokenizers import write_vocabulary
from tests.integration.gguf_oracle import loaded, oracle

sentencepiece = pytest.importorskip("sentencepiece")

AWKWARD = [
    "Hello world",
    " leading space, and  two  spaces ",
    "\n\n\ttabs\r\nand newlines\n",
    "3.14159 1000000 12,345 007 x2y",
    "naïve café — “quotes” … 你好，世界 नमस्ते 🚀👩‍🚀",  # noqa: RUF001
    "I'm you'Re WE'LL don't",
    "def f(x):\n    return x**2  # comment\n",
    "camelCase XMLHttpRequest ÉCOLE ǅ",
    "a<|endoftext|>b<|end_of_text|>",
    "",
]
TOKENS = "tokenizer.ggml.tokens"
SEPARATOR = "\n__ggml_vocab_test__\n"
PUBLISHED = {
    "Llama-2": "llama-spm",
    "Llama-3.1": "llama-bpe",
    "Phi-3-mini": "phi-3",
    "Qwen2.5": "qwen2",
    "GPT-2": "gpt-2",
    "Granite-3": "refact",
    "DeepSeek-V2-Lite": "deepseek-llm",
}
"""Families for whose whole vocabulary llama.cpp's tree has texts, and the ids that transformers 4
gave for them from the models' own repositories."""


@pytest.fixture(scope="module")
def checkpoints(
    llama_cpp_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    base = tmp_path_factory.mktemp("families")
    return {
        name: Checkpoint.open(write_checkpoint(family, llama_cpp_source, base / name))
        for name, family in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def theirs(
    checkpoints: dict[str, Checkpoint],
    llama_cpp_source: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What llama.cpp's converter writes for each family that it knows: ``<family>.gguf``."""
    out = tmp_path_factory.mktemp("theirs")
    known = [name for name, family in FAMILIES.items() if family.probed]
    jobs = [(checkpoints[name].path, "BF16", out / f"{name}.gguf") for name in known]
    oracle(llama_cpp_source, jobs, "--vocab-only")
    return out


@pytest.fixture(scope="module")
def ours(
    checkpoints: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """What we write for a family, once."""
    out = tmp_path_factory.mktemp("ours")

    def made(name: str) -> Path:
        path = out / f"{name}.gguf"
        if not path.exists():
            write_vocabulary(read_tokenizer(checkpoints[name], FAMILIES[name].rows), path)
        return path

    return made


def assert_tokenizes_as(path: Path, directory: Path, texts: list[str]) -> None:
    """As the model's own files say. Not as AutoTokenizer does: for LlamaTokenizer it drops a
    space from the beginning of a text, and for GPT2Tokenizer it puts GPT-2's rules in place of
    those in tokenizer.json."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    pieces = None
    if (directory / "tokenizer.model").is_file():
        pieces = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    with loaded(path, vocab_only=True) as model:
        for text in texts:
            found = model.tokenize(text.encode(), add_bos=True, special=True)
            assert found == tokenizer(text).input_ids, text
            if pieces is not None and text and "<|" not in text:
                assert found[1:] == pieces.EncodeAsIds(text), text


@pytest.mark.parametrize("name", FAMILIES)
def test_each_familys_vocabulary_is_the_converters(
    name: str, ours: Callable[[str], Path], theirs: Path
) -> None:
    family, found = FAMILIES[name], read_header(ours(name)).metadata
    assert found["tokenizer.ggml.pre"] == family.pre
    if not family.probed:
        return
    expected = read_header(theirs / f"{name}.gguf").metadata
    keys = {key for key in found.keys() | expected.keys() if key.startswith("tokenizer.ggml.")}
    different = {key for key in keys if found.get(key) != expected.get(key)}
    if name.startswith("Gemma"):
        # The converter makes runs of spaces text of their own, and llama.cpp then reads 32 spaces
        # as 31 and one. tokenizer.json reads 16 and 16: they stay pieces.
        runs = {at for at, text in enumerate(expected[TOKENS]) if not text.strip(" ")}
        for key in (TOKENS, "tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            pairs = enumerate(zip(found[key], expected[key], strict=True))
            assert {at for at, (ours_, theirs_) in pairs if ours_ != theirs_} == runs
            different.remove(key)
    assert different == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_familys_vocabulary_is_proved(
    name: str, checkpoints: dict[str, Checkpoint], ours: Callable[[str], Path]
) -> None:
    found = compare_gguf(checkpoints[name], ours(name))
    assert found.compared > 800
    assert found.differences == []


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_tokenizes_as_the_models_own_files_say(
    name: str, checkpoints: dict[str, Checkpoint], ours: Callable[[str], Path]
) -> None:
    assert_tokenizes_as(ours(name), checkpoints[name].path, AWKWARD)


@pytest.mark.parametrize(("name", "vocabulary"), PUBLISHED.items())
def test_llama_cpp_gives_the_ids_that_its_authors_published(
    name: str, vocabulary: str, ours: Callable[[str], Path], llama_cpp_source: Path
) -> None:
    stem = llama_cpp_source / "models" / f"ggml-vocab-{vocabulary}.gguf"
    *texts, end = stem.with_name(f"{stem.name}.inp").read_text("utf-8").split(SEPARATOR)
    lines = stem.with_name(f"{stem.name}.out").read_text("utf-8").splitlines()
    assert len(texts) == len(lines) > 40
    assert end == ""
    with loaded(ours(name), vocab_only=True) as model:
        for text, line in zip(texts, lines, strict=True):
            expected = [int(token) for token in line.split()]
            assert model.tokenize(text.encode(), add_bos=False, special=False) == expected, text


@pytest.mark.parametrize("name", ["Gemma-3", "Phi-3-mini", "Mistral-7B-v0.3"])
def test_a_sentencepiece_model_without_its_model_file_tokenizes_alike(
    name: str, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    # llama.cpp's converter is no oracle here: it refuses the first two, and gives all tokens of
    # the third one score, by which llama.cpp merges from the left.
    directory = tmp_path / name
    shutil.copytree(checkpoints[name].path, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings.pop("add_prefix_space", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    model = (directory / "tokenizer.model").read_bytes()
    (directory / "tokenizer.model").unlink()
    checkpoint = Checkpoint.open(directory)
    write_vocabulary(read_tokenizer(checkpoint, FAMILIES[name].rows), tmp_path / "ours.gguf")
    (directory / "tokenizer.model").write_bytes(model)  # the oracle's
    assert_tokenizes_as(tmp_path / "ours.gguf", directory, AWKWARD)


def test_a_wrong_tokenizer_class_changes_nothing(
    checkpoints: dict[str, Checkpoint], ours: Callable[[str], Path], tmp_path: Path
) -> None:
    # DeepSeek's distilled Qwen3, for one, calls its byte-level tokenizer a Llama's.
    directory = tmp_path / "Qwen3"
    shutil.copytree(checkpoints["Qwen3"].path, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    made = read_tokenizer(Checkpoint.open(directory), FAMILIES["Qwen3"].rows)
    write_vocabulary(made, tmp_path / "v.gguf")
    assert (tmp_path / "v.gguf").read_bytes() == ours("Qwen3").read_bytes()


def test_the_known_tokenizers_are_the_converters(llama_cpp_source: Path) -> None:
    source = (llama_cpp_source / "conversion" / "base.py").read_text("utf-8")
    answers = re.findall(r'if chkhsh == "(\w+)":\n\s+# ref: \S+\n\s+res = "([^"]+)"', source)
    assert len(answers) == source.count("if chkhsh == ")
    assert dict(answers) == pretokenizers.BY_PROBE
