"""Vocabularies and special tokens, against sentencepiece and cases worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.gguf.vocabulary import TokenType
from quantkit.models.checkpoint import Checkpoint
from quantkit.producers.gguf import pretokenizers, sentencepiece
from quantkit.producers.gguf.special_tokens import read_special_tokens
from quantkit.producers.gguf.tokenizer import read_tokenizer
from tests import gguf_tokenizers
from tests.models import add_tokens, make_checkpoint


def added(*contents: str) -> list[dict[str, Any]]:
    return [{"id": i, "content": content, "special": True} for i, content in enumerate(contents)]


def special(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}


def sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


def test_pieces_are_what_sentencepiece_reads(tmp_path: Path) -> None:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor()
    gguf_tokenizers.write_sentencepiece(tmp_path)
    processor.LoadFromFile(str(tmp_path / "tokenizer.model"))
    pieces = sentencepiece.read_pieces(tmp_path / "tokenizer.model")
    assert len(pieces) == processor.GetPieceSize() == gguf_tokenizers.SENTENCEPIECE_VOCABULARY
    for token, piece in enumerate(pieces):
        assert piece.text.decode() == processor.IdToPiece(token)
        assert piece.score == processor.GetScore(token)
        assert (piece.type == TokenType.BYTE) == processor.IsByte(token)
        assert (piece.type == TokenType.CONTROL) == processor.IsControl(token)
        assert (piece.type == TokenType.UNKNOWN) == processor.IsUnknown(token)


def test_damaged_and_other_sentencepiece_files_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(b"\x0a\x7fabc")
    with pytest.raises(CheckpointError, match="damaged SentencePiece model"):
        sentencepiece.read_pieces(model)
    model.write_bytes(b"\x0a\x03\x0a\x01a")  # one piece, "a", and no trainer: unigram
    with pytest.raises(ConversionError, match="not BPE"):
        sentencepiece.read_pieces(model)
    model.write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's format
    assert not sentencepiece.is_model(model)


def test_special_tokens_of_llama_3(tmp_path: Path) -> None:
    bos, eos = "<|begin|>", "<|eot|>"
    description = {
        "added_tokens": added(bos, "<|end|>", eos),
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel"},
                {
                    "type": "TemplateProcessing",
                    "single": [special(bos), sequence("A")],
                    "pair": [special(bos), sequence("A"), special(bos), sequence("B")],
                },
            ],
        },
    }
    settings = {"bos_token": {"content": bos}, "eos_token": eos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"eos_token_id": [1, 2], "bos_token_id": 1, "pad_token_id": 1}
    found = read_special_tokens(tmp_path, description, config, 3)
    assert found.ids == {"bos": 0, "eos": 2, "pad": 1, "cls": 0}
    assert found.added == {"bos": True, "eos": False, "sep": False}


def test_config_json_names_what_the_tokenizer_does_not(tmp_path: Path) -> None:
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000, "unk_token_id": None}
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>"}')
    found = read_special_tokens(tmp_path, {}, config, 32000)
    assert found.ids == {"bos": 1, "eos": 2}  # 32000 is no token of 32000
    assert found.added == {"bos": True}


def test_a_token_that_ends_every_text_is_eos_and_the_named_one_ends_turns(tmp_path: Path) -> None:
    description = {
        "added_tokens": added("<end>", "<turn>"),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence("A"), special("<end>")],
            "pair": [],
        },
    }
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<turn>"}')
    found = read_special_tokens(tmp_path, description, {}, 2)
    assert (found.ids["eos"], found.ids["eot"], found.added["eos"]) == (0, 1, True)


def test_names_and_ids_are_taken_from_where_they_are(tmp_path: Path) -> None:
    description = {
        "added_tokens": added("<cls>", "<sep>", "<bos>"),
        "post_processor": {"type": "RobertaProcessing", "cls": ["<cls>", 0], "sep": ["<sep>", 1]},
    }
    config = {"text_config": {"bos_token_id": 2, "eos_token_id": 1}}
    found = read_special_tokens(tmp_path, description, config, None)
    assert found.ids == {"bos": 2, "eos": 1}  # without tokenizer_config.json no token has a name
    assert found.added == {"bos": True, "eos": True, "sep": True}
    settings = {"cls_token": "<cls>", "sep_token": "<sep>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = read_special_tokens(tmp_path, description, config, None)
    assert found.ids == {"bos": 0, "eos": 1, "cls": 0, "sep": 1}


def test_only_phi_3_goes_by_the_flags_of_added_tokens_alone(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    gguf_tokenizers.write_sentencepiece(tmp_path)
    settings = {"added_tokens_decoder": {"3": {"content": "<|a|>"}, "4": {"content": "▁b"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "added_tokens": [
                    {"id": 3, "content": "<|a|>", "special": False},
                    {"id": 4, "content": "▁b", "special": False},
                    {"id": 5, "content": "c", "special": True},
                ]
            }
        )
    )
    found = [token.type for token in sentencepiece.from_model(tmp_path, 1000)[3:6]]
    assert found == [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.CONTROL]
    phi_3 = sentencepiece.from_model_of_phi_3(tmp_path, 1000)[3:6]
    assert [token.type for token in phi_3] == [TokenType.USER_DEFINED] * 2 + [TokenType.CONTROL]
    assert [token.text.decode() for token in phi_3] == ["<|a|>", "▁b", "c"]


@pytest.mark.parametrize(
    ("rules", "ignore_merges", "name"),
    [
        (gguf_tokenizers.GPT_2, False, "gpt-2"),
        (gguf_tokenizers.DIGITS, False, "smollm"),
        (gguf_tokenizers.QWEN_2, False, "qwen2"),
        (gguf_tokenizers.LLAMA_3, True, "llama-bpe"),
        (gguf_tokenizers.LLAMA_3, False, "smaug-bpe"),
        (gguf_tokenizers.TEKKEN, True, "tekken"),
        (gguf_tokenizers.GPT_4O, False, "gpt-4o"),
        (gguf_tokenizers.split(r"\p{N}{1,2}"), False, None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False, None),
        (pre_tokenizers.Whitespace(), False, None),
    ],
)
def test_well_known_splitting_rules_are_recognized_in_new_tokenizers(
    rules: Any, ignore_merges: bool, name: str | None
) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = rules
    description = json.loads(tokenizer.to_str())
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if name is None:
        with pytest.raises(ConversionError, match="no known pre-tokenizer"):
            pretokenizers.detect(fast, description, Path("x"))
    else:
        assert pretokenizers.detect(fast, description, Path("x")) == name


def test_rows_without_a_token_are_padded_and_tokens_without_a_row_refused(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    tokenizer = read_tokenizer(checkpoint, 1030)
    texts = [token.text for token in tokenizer.tokens]
    types = [token.type for token in tokenizer.tokens]
    assert texts[1024:] == [f"[PAD{i}]".encode() for i in range(1024, 1030)]
    assert types[:3] == [TokenType.CONTROL] * 3
    assert types[3:] == [TokenType.NORMAL] * 1021 + [TokenType.UNUSED] * 6
    with pytest.raises(ConversionError, match=r"has id 10\d\d, but the embedding has 1000 rows"):
        read_tokenizer(checkpoint, 1000)


def test_where_llama_cpp_would_begin_with_bos_it_is_told_not_to(tmp_path: Path) -> None:
    # For these rules it does, unless the file says otherwise; that of its converter says nothing.
    directory = make_checkpoint(tmp_path / "model", num_hidden_layers=1)
    file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.pre_tokenizer = gguf_tokenizers.LLAMA_3
    description = json.loads(tokenizer.to_str())
    description["model"]["ignore_merges"] = True
    file.write_text(json.dumps(description))
    found = read_tokenizer(Checkpoint.open(directory), 1024)
    assert (found.pre, found.special.added) == ("llama-bpe", {"bos": False})
    begin = [special("<|im_start|>"), sequence("A")]
    template = {"type": "TemplateProcessing", "single": begin, "pair": [*begin, sequence("B")]}
    template["special_tokens"] = {
        "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
    }
    file.write_text(json.dumps(description | {"post_processor": template}))
    assert read_tokenizer(Checkpoint.open(directory), 1024).special.added == {"bos": True}


def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", num_hidden_layers=1)
    description = json.loads((directory / "tokenizer.json").read_text())
    for change, message in (
        ({"model": {"type": "WordPiece", "vocab": {}}}, "unsupported tokenizer .WordPiece."),
        ({"model": {"type": "Unigram", "vocab": []}}, "unsupported tokenizer .Unigram."),
    ):
        (directory / "tokenizer.json").write_text(json.dumps(description | change))
        with pytest.raises(ConversionError, match=message):
            read_tokenizer(Checkpoint.open(directory), 1024)
    (directory / "tokenizer.json").write_text(json.dumps(description | {"decoder": 3}))
    with pytest.raises(CheckpointError, match="unreadable tokenizer"):
        read_tokenizer(Checkpoint.open(directory), 1024)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not JSON"):
        read_tokenizer(Checkpoint.open(directory), 1024)


def test_glm_4_ends_texts_and_turns_as_llama_cpps_converter_has_it(tmp_path: Path) -> None:
    """Whatever tokenizer_config.json calls by these names: here its EOS is another token."""
    path = make_checkpoint(tmp_path / "glm", family="glm4", pad_token_id=0)
    add_tokens(path, {900: "<|user|>"})
    found = read_tokenizer(Checkpoint.open(path), 1024).special.ids
    expected = {"bos": 0, "eos": 0, "unk": 0, "eot": 900}  # <|endoftext|> is the first token
    assert {role: found.get(role) for role in expected} == expected
