"""Whether a variant reads text as tokenizer.json does: with each fault that was seen put back, the
proof alone must find it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from quantkit import api
from quantkit.data.calibration import bos_id, calibrate
from quantkit.data.text import Text
from quantkit.engines.llamacpp.vocabulary import Vocabulary
from quantkit.engines.vllm.tokenizer import as_written
from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.gguf.vocabulary import Token, TokenType
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.models.tokenizer import load_auto_tokenizer, load_tokenizer
from quantkit.producers.convert import convert, plan
from quantkit.producers.gguf.sentencepiece import is_of
from quantkit.producers.gguf.tokenizer import Tokenizer as GGUFTokenizer
from quantkit.producers.gguf.tokenizer import read_tokenizer
from quantkit.producers.proof import probe, tokens
from tests.gguf_tokenizers import write_sentencepiece, write_vocabulary
from tests.models import begin_with_bos, make_checkpoint, write_tokenizer

ROWS = 1024
TEXT = "How does  it read spaces?\n\tAnd “this” — naïvely, ﬁrst of all: 3.14159 é 漢字"
TURN = ["<|im_start|>", "<|im_end|>"]


def checkpoint(directory: Path) -> Checkpoint:
    """The tokenizer in ``directory`` as a source, with no weights to speak of."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": ROWS}
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(1)}, directory / "model.safetensors")
    return Checkpoint.open(directory)


def change(directory: Path, by: Callable[[Tokenizer], None], **settings: Any) -> None:
    """Change tokenizer.json, and settings in tokenizer_config.json; None takes one away."""
    file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    by(tokenizer)
    tokenizer.save(str(file))
    path = directory / "tokenizer_config.json"
    merged = json.loads(path.read_text()) | settings
    kept = {key: value for key, value in merged.items() if value is not None}
    path.write_text(json.dumps(kept))


def set_(name: str, value: Any) -> Callable[[Tokenizer], None]:
    return lambda tokenizer: setattr(tokenizer, name, value)


def without_spaces_before(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)


def nothing_around(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing("$A", "$A $B", [])


def two_turns(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in TURN])


def proved(source: Checkpoint, made: GGUFTokenizer, path: Path) -> tokens.Comparison:
    return tokens.compare_gguf(source, write_vocabulary(made, path))


def ids_of_the_file(directory: Path, text: str) -> list[int]:
    ids: list[int] = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids
    return ids


def test_the_class_that_the_settings_name_is_not_asked(tmp_path: Path) -> None:
    # As the distillations of DeepSeek-R1 have it: a byte-level BPE that is called a Llama's.
    write_tokenizer(tmp_path)
    change(tmp_path, lambda _: None, tokenizer_class="LlamaTokenizerFast", add_bos_token=True)
    source = checkpoint(tmp_path)
    expected = ids_of_the_file(tmp_path, TEXT)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids != expected
    found = load_tokenizer(tmp_path)
    assert found(TEXT).input_ids == expected
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)
    assert found.apply_chat_template([{"role": "a", "content": "b"}], tokenize=False) == "a: b"
    assert proved(source, read_tokenizer(source, ROWS), tmp_path / "v.gguf").differences == []


def test_vllm_is_given_a_tokenizer_that_reads_as_the_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    directory = tmp_path / "model"
    directory.mkdir()
    write_tokenizer(directory)
    change(directory, lambda _: None, tokenizer_class="LlamaTokenizerFast")
    source = checkpoint(directory)
    given = as_written(directory)
    assert given is not None
    assert as_written(directory) == given
    auto = load_auto_tokenizer(given)
    assert auto(TEXT).input_ids == ids_of_the_file(directory, TEXT)
    assert auto.chat_template == source.tokenizer.chat_template
    found = tokens.compare_auto(source, directory)
    assert found.differences == []
    assert "(LlamaTokenizer) reads" in found.remarks[0]
    monkeypatch.setattr("quantkit.engines.vllm.tokenizer.as_written", lambda directory: None)
    (difference,) = tokens.compare_auto(source, directory).differences
    assert "tokenizer.json [" in difference


def test_tokens_that_only_tokenizer_json_has_are_tokens_of_the_gguf(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    change(tmp_path, two_turns, added_tokens_decoder=None, eos_token=TURN[1])
    source = checkpoint(tmp_path)
    made = read_tokenizer(source, ROWS)
    assert [made.tokens[token].text.decode() for token in (1000, 1001)] == TURN
    assert {made.tokens[token].type for token in (1000, 1001)} == {TokenType.CONTROL}
    assert made.special.ids["eos"] == 1001
    assert proved(source, made, tmp_path / "right.gguf").differences == []
    pads = [Token(f"[PAD{at}]".encode(), -1.0, TokenType.UNUSED) for at in (1000, 1001)]
    wrong = replace(made, tokens=[*made.tokens[:1000], *pads, *made.tokens[1002:]])
    (difference,) = proved(source, wrong, tmp_path / "wrong.gguf").differences
    assert difference.startswith("'<|im_end|>': llama.cpp reads [")
    assert "tokenizer.json ['<|im_end|>' 1001]" in difference


def test_what_tokenizer_json_does_not_add_is_text(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    description["added_tokens"] = [
        t for t in description["added_tokens"] if t["content"] != "<unk>"
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    source = checkpoint(tmp_path)
    made = read_tokenizer(source, ROWS)
    assert (made.tokens[0].text, made.tokens[0].type) == (b"<unk>", TokenType.NORMAL)
    assert proved(source, made, tmp_path / "right.gguf").differences == []
    marked = made.tokens[0]._replace(type=TokenType.UNKNOWN)
    wrong = replace(made, tokens=[marked, *made.tokens[1:]])
    (difference,) = proved(source, wrong, tmp_path / "wrong.gguf").differences
    assert difference.startswith("'<unk>': llama.cpp reads ['<unk>' 0]")


def test_a_tokenizer_model_of_another_vocabulary_gives_no_scores(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    assert is_of(tmp_path / "tokenizer.model", description)
    vocabulary = description["model"]["vocab"]
    one, two = list(vocabulary)[500:502]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    assert not is_of(tmp_path / "tokenizer.model", description)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    source = checkpoint(tmp_path)
    made = read_tokenizer(source, ROWS)
    assert [made.tokens[at].text.decode() for at in (500, 501)] == [two, one]
    assert proved(source, made, tmp_path / "v.gguf").differences == []


def test_a_space_is_put_before_a_text_only_where_tokenizer_json_does(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    source = checkpoint(tmp_path)
    assert read_tokenizer(source, ROWS).space_prefix is None
    change(tmp_path, without_spaces_before, add_prefix_space=True)
    source = checkpoint(tmp_path)
    made = read_tokenizer(source, ROWS)
    assert made.space_prefix is False
    assert proved(source, made, tmp_path / "right.gguf").differences == []
    wrong = replace(made, space_prefix=None)
    (difference,) = proved(source, wrong, tmp_path / "wrong.gguf").differences
    assert difference.startswith("' ': llama.cpp reads ['<s>' 1, '▁▁' 259], tokenizer.json [")


@pytest.mark.parametrize("kept", [True, False])
def test_no_bos_is_added_where_the_post_processor_adds_none(tmp_path: Path, kept: bool) -> None:
    write_sentencepiece(tmp_path, keep_model=kept)
    change(tmp_path, nothing_around, add_bos_token=None)
    source = checkpoint(tmp_path)
    made = read_tokenizer(source, ROWS)
    assert made.special.added["bos"] is False
    assert bos_id(source.tokenizer) is None
    assert proved(source, made, tmp_path / "right.gguf").differences == []
    del made.special.added["bos"]
    (difference,) = proved(source, made, tmp_path / "wrong.gguf").differences
    assert difference.startswith("'': llama.cpp reads ['<s>' 1], tokenizer.json []")


def test_what_is_put_around_a_text_is_what_the_post_processor_does(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    both = processors.TemplateProcessing("<s> $A </s>", "$A $B", [("<s>", 1), ("</s>", 2)])
    change(tmp_path, set_("post_processor", both), add_bos_token=False, add_eos_token=False)
    source = checkpoint(tmp_path)
    made = read_tokenizer(source, ROWS)
    assert (made.special.added["bos"], made.special.added["eos"]) == (True, True)
    assert proved(source, made, tmp_path / "v.gguf").differences == []


@pytest.mark.parametrize("name", ["NFKC", "Lowercase"])
def test_a_normalizer_that_llama_cpp_lacks_is_refused_before_anything_is_made(
    tmp_path: Path, name: str
) -> None:
    directory = make_checkpoint(tmp_path / "model", num_hidden_layers=1)
    write_sentencepiece(directory)
    more = normalizers.Sequence(
        [getattr(normalizers, name)(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    change(directory, set_("normalizer", more))
    source, spec = Checkpoint.open(directory), Spec("gguf", "Q8_0")
    with pytest.raises(
        ConversionError, match=rf"as tokenizer\.json asks \({name}\).* pass --allow"
    ):
        plan(source, spec)
    with pytest.raises(ConversionError, match=r"llama\.cpp reads"):
        convert(source, spec, None, tmp_path / "out")
    assert list((tmp_path / "out").glob("*")) == []
    made = convert(source, spec, None, tmp_path / "out", allow_tokenizer_differences=True)
    assert made.manifest is not None
    (told,) = made.manifest.proof["tokens"].differences
    assert f"({name})" in told
    assert told in made.manifest.notes
    assert told in api.inspect(str(made.path))["oddities"]
    assert made.manifest.proof["tokens"].compared > 300


def test_what_a_token_does_with_spaces_beside_it_is_told(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    stripping = AddedToken("<|turn|>", lstrip=True, rstrip=True, special=True)
    change(tmp_path, lambda tokenizer: tokenizer.add_special_tokens([stripping]) and None)
    source = checkpoint(tmp_path)
    made = read_tokenizer(source, ROWS + 1)
    (difference,) = proved(source, made, tmp_path / "v.gguf").differences
    assert "cannot express that <|turn|> takes the spaces before it (lstrip)" in difference
    assert "cannot express that <|turn|> takes the spaces after it (rstrip)" in difference


def test_text_that_llama_cpp_does_not_compose_is_only_remarked(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    change(tmp_path, set_("normalizer", normalizers.NFC()))
    source = checkpoint(tmp_path)
    found = proved(source, read_tokenizer(source, ROWS), tmp_path / "v.gguf")
    assert found.differences == []
    (remark,) = found.remarks
    assert "does not compose characters (NFC)" in remark


def test_what_composes_and_marks_spaces_is_only_remarked(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    steps = [normalizers.NFC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    change(tmp_path, set_("normalizer", normalizers.Sequence(steps)))
    source = checkpoint(tmp_path)
    found = proved(source, read_tokenizer(source, ROWS), tmp_path / "v.gguf")
    assert found.differences == []
    assert any("does not compose characters (NFC)" in remark for remark in found.remarks)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_spaces_that_begin_a_text_are_told(tmp_path: Path, scheme: str) -> None:
    write_sentencepiece(tmp_path)
    change(tmp_path, set_("normalizer", None))
    splitter = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    change(tmp_path, set_("pre_tokenizer", splitter))
    source = checkpoint(tmp_path)
    (told,) = proved(source, read_tokenizer(source, ROWS), tmp_path / "v.gguf").differences
    assert told.startswith("' ': ")
    assert "a space before a text that begins with one, tokenizer.json does not (Metaspace)" in told


@pytest.mark.parametrize("begins", [True, False])
def test_bos_is_measured_and_written_alike_without_a_tokenizer_json(
    tmp_path: Path, begins: bool
) -> None:
    write_sentencepiece(tmp_path)
    change(tmp_path, lambda _: None, add_bos_token=begins or None)
    (tmp_path / "tokenizer.json").unlink()
    source = checkpoint(tmp_path)
    assert (bos_id(source.tokenizer) is not None) is begins
    vocabulary = write_vocabulary(read_tokenizer(source, ROWS), tmp_path / "v.gguf")
    with Vocabulary(vocabulary) as made:
        assert made.adds_bos is begins


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[]", "expected a JSON object, found list")]
)
def test_settings_that_are_no_object_are_named(tmp_path: Path, content: str, message: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {message}"):
        load_tokenizer(tmp_path)


def test_tokens_that_are_special_for_one_side_only_are_remarked(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    plain = AddedToken("<|looks_special|>", normalized=False)
    change(tmp_path, lambda tokenizer: tokenizer.add_tokens([plain]) and None)
    source = checkpoint(tmp_path)
    found = proved(source, read_tokenizer(source, ROWS + 1), tmp_path / "v.gguf")
    assert found.differences == []
    assert found.remarks[0].startswith("llama.cpp takes <|looks_special|> for control tokens")


def test_each_of_many_added_tokens_is_compared(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    many = [AddedToken(f"<|extra_{at}|>", normalized=False) for at in range(600)]
    change(tmp_path, lambda tokenizer: tokenizer.add_special_tokens(many) and None)
    source = checkpoint(tmp_path)
    made = read_tokenizer(source, ROWS + 600)
    assert proved(source, made, tmp_path / "right.gguf").differences == []
    one = Token(b"<|another|>", 0.0, TokenType.CONTROL)
    wrong = replace(made, tokens=[*made.tokens[:1500], one, *made.tokens[1501:]])
    (difference,) = proved(source, wrong, tmp_path / "wrong.gguf").differences
    assert "'<|another|>'" in difference or "<|extra_476|>" in difference


def test_the_probe_has_what_tokenizers_differ_on(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = probe.texts(tokenizer)
    assert len(set(texts)) == len(texts) > 300
    assert {"", " ", "\n", "e\u0301", "ﬁ ﬂ ﬃ ﬆ", "\ue000", "👩‍🚀"} <= set(texts)
    assert probe.with_tokens(["<a>", "<b>"])[:3] == ["<a>", "<b>", "a<a>ba<b>b"]


def test_every_script_of_the_vocabulary_is_in_the_probe(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.model = type(tokenizer.model)({"▁": 0, "▁ꔀꔁ": 1, "𞤀𞤣": 2}, [])
    texts = probe.texts(tokenizer)
    assert {" ꔀꔁ", "𞤀𞤣"} <= set(texts)


def test_a_vocabulary_over_which_llama_cpp_would_abort_is_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    source = checkpoint(tmp_path)
    made = read_tokenizer(source, ROWS)
    twice = [*made.tokens[:-1], made.tokens[600]]
    no_byte = [*made.tokens[:20], replace_text(made.tokens[20]), *made.tokens[21:]]
    for kind, wrong, message in (
        ("twice", replace(made, tokens=twice), "is in its vocabulary twice"),
        ("byte", replace(made, tokens=no_byte), "has no token <0x11>"),
    ):
        path = write_vocabulary(wrong, tmp_path / f"{kind}.gguf")
        with pytest.raises(CheckpointError, match=message), Vocabulary(path):
            pass


def replace_text(token: Token) -> Token:
    return token._replace(text=b"another")


def test_calibration_windows_begin_as_texts_do(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = Text("words", None, "a long text of many words " * 40)
    plain = calibrate(text, load_tokenizer(tmp_path), samples=4, sequence_length=16, seed=0)
    assert 1 not in plain.ids
    begin_with_bos(tmp_path)
    found = calibrate(text, load_tokenizer(tmp_path), samples=4, sequence_length=16, seed=0)
    assert found.ids[:, 0].tolist() == [1] * 4
    assert 1 not in found.ids[:, 1:]
