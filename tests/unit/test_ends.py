"""At which tokens answers end, and that llama.cpp ends them there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantkit.engines.llamacpp.vocabulary import Vocabulary
from quantkit.formats.gguf.chat import KNOWN_ENDS
from quantkit.formats.gguf.gguf_source import GGUFSource
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.end_tokens import end_ids
from quantkit.models.spec import Spec
from quantkit.models.variant import Variant
from quantkit.producers.convert import convert
from tests.chats import TEMPLATES
from tests.models import add_tokens, begin_with_bos

END_OF_TEXT, BEGIN, END = 0, 1, 2
"""The tokens that the tiny tokenizer adds; 2 is its EOS."""


def model(
    source: Path,
    directory: Path,
    template: str | None = None,
    added: dict[int, str] | None = None,
    **generation: Any,
) -> Path:
    """A copy with another template, tokens renamed to be added ones, and a generation config."""
    shutil.copytree(source, directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    add_tokens(directory, added or {})
    return directory


def turns(end: str, last: str | None = None) -> str:
    """A template that writes ``end`` after every message, or ``last`` after the last one."""
    after = f"loop.last and {last is not None!r}"
    return (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        f"{{{{ {json.dumps(last)} if {after} else {json.dumps(end)} }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


@pytest.mark.parametrize(
    ("template", "generation", "expected"),
    [
        (None, {}, {END}),
        (None, {"eos_token_id": 7}, {END, 7}),
        (None, {"eos_token_id": [0, 7]}, {END, 0, 7}),
        (None, {"eos_token_id": None}, {END}),
        (None, {"eos_token_id": [True, -1, "3", 4]}, {END, 4}),
        (turns("<turn>"), {}, {END, 1000}),
        (turns("<turn>\n"), {}, {END, 1000}),
        (turns(" <turn>more"), {}, {END, 1000}),
        (turns("<turn><stop>"), {}, {END, 1000}),
        (turns("<turn>", "<stop>"), {}, {END}),  # which of them it is nobody knows
        (turns("<turns>"), {}, {END, 1002}),  # not <turn>
        (turns("\n\n"), {}, {END}),
        ("{{ raise_exception('no') }}", {}, {END}),
        ("{{ 1 + 'a' }}", {}, {END}),
        ("{% if %}", {}, {END}),
        ("{% for m in messages %}{{ m.content[0].text }}<turn>{% endfor %}", {}, {END, 1000}),
        (TEMPLATES["chatml"], {}, {END}),
        (TEMPLATES["qwen"], {"eos_token_id": [END, 0]}, {END, 0}),
        (TEMPLATES["mistral"], {}, {END}),  # by the name eos_token
    ],
)
def test_ends_are_those_of_files_tokenizer_and_template(
    tiny_llama: Path,
    tmp_path: Path,
    template: str | None,
    generation: dict[str, Any],
    expected: set[int],
) -> None:
    added = {1000: "<turn>", 1001: "<stop>", 1002: "<turns>"}
    directory = model(tiny_llama, tmp_path / "model", template, added, **generation)
    assert set(end_ids(directory, END)) == expected
    assert set(end_ids(directory)) == expected


def test_config_json_counts_as_well(tiny_llama: Path, tmp_path: Path) -> None:
    directory = model(tiny_llama, tmp_path / "model", eos_token_id=7)
    for config in ({"eos_token_id": 9}, {"text_config": {"eos_token_id": [9]}}):
        (directory / "config.json").write_text(json.dumps(config))
        assert end_ids(directory, 5) == (7, 9, 5, END)


def ends_in_llama_cpp(path: Path) -> set[int]:
    with Vocabulary(path) as vocabulary:
        return {token for token in range(len(vocabulary)) if vocabulary.is_end(token)}


def made(source: Path, out: Path) -> Variant:
    return convert(Checkpoint.open(source), Spec("gguf", "Q8_0"), None, out)


def test_llama_cpp_ends_at_all_that_the_file_can_name(tiny_llama: Path, tmp_path: Path) -> None:
    added = {1000: "<turn>", 1001: "<stop>"}
    source = model(
        tiny_llama, tmp_path / "model", turns("<turn>"), added, eos_token_id=[END, 1001, 1000]
    )
    variant = made(source, tmp_path / "out")
    assert variant.manifest is not None
    assert (variant.manifest.notes, variant.manifest.override_kv) == ([], {})
    assert ends_in_llama_cpp(variant.weights) >= {END, 1000, 1001}
    with Vocabulary(variant.weights) as vocabulary:
        assert vocabulary.role("eot") == 1000


def test_more_ends_than_keys_are_told_to_the_server_or_noted(
    tiny_llama: Path, tmp_path: Path
) -> None:
    ids = list(range(1000, 1007))
    source = model(
        tiny_llama, tmp_path / "m", None, {i: f"<end {i}>" for i in ids}, eos_token_id=[END, *ids]
    )
    variant = convert(Checkpoint.open(source), Spec("gguf", "F16"), None, tmp_path / "out")
    manifest = variant.manifest
    assert manifest is not None
    assert manifest.override_kv == {
        f"tokenizer.ggml.fim_{role}_token_id": id_
        for role, id_ in (("pad", 1002), ("rep", 1003), ("sep", 1004))
    }
    told, lost = manifest.notes
    assert "<end 1002> (1002), <end 1003> (1003), <end 1004> (1004) too" in told
    assert "<end 1005> (1005), <end 1006> (1006) too, which llama.cpp cannot be told" in lost
    # What is made of that file knows it too.
    again = GGUFSource.of_file(variant.weights, allow_requantize=False)
    second = convert(again, Spec("gguf", "Q8_0"), None, tmp_path / "again").manifest
    assert second is not None
    assert (second.override_kv, second.proof) == (manifest.override_kv, manifest.proof)
    assert set(second.notes) >= {told, lost}


def test_texts_that_llama_cpp_knows_are_those_that_it_says(tmp_path: Path) -> None:
    """Each beside tokens that mean nothing to it, as some of them cancel others."""
    for text in sorted(KNOWN_ENDS):
        writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        tokens = ["a", "aa", text]
        writer.add_token_list(tokens)
        writer.add_token_types([1, 1, 3])
        writer.add_token_merges(["a a"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        assert ends_in_llama_cpp(tmp_path / "v.gguf") >= {2}, text


def test_llama_cpp_begins_chats_with_a_bos_that_the_template_does_not_write(
    tiny_llama: Path, tmp_path: Path
) -> None:
    for template, noted in ((turns("<|im_end|>"), True), (TEMPLATES["chatml"], False)):
        source = model(tiny_llama, tmp_path / f"model {noted}", template)
        begin_with_bos(source)
        manifest = made(source, tmp_path / f"out {noted}").manifest
        assert manifest is not None
        assert any("llama.cpp begins chats with <|im_start|>" in n for n in manifest.notes) == noted
