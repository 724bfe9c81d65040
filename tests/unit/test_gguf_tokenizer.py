"""Vocabularies and special tokens, against sentencepiece and cases worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from quantkit.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, ConversionError
from quantkit.formats.gguf import pretokenizers, sentencepiece
from quantkit.formats.gguf.special_tokens import read_special_tokens
from quantkit.formats.gguf.tokenizer import read_tokenizer
from tests import gguf_tokenizers
from tests.models import make_checkpoint


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
        assert (piece.type == sentencepiece.PieceType.BYTE) == processor.IsByte(token)
        assert (piece.type == sentencepiece.PieceType.CONTROL) == processor.IsControl(token)
        assert (piece.type == sentencepiece.PieceType.UNKNOWN) == processor.IsUnknown(token)


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
    settings = {"bos_token": {"content": bos}, "eos_token": eos, "chat_template": "T"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"eos_token_id": [1, 2], "bos_token_id": 1, "pad_token_id": 1}
    found = read_special_tokens(tmp_path, description, config, 3)
    assert found.ids == {"bos": 0, "eos": 2, "pad": 1, "cls": 0}
    assert found.added == {"bos": True, "eos": False, "sep": False}
    assert found.chat_template == "T"


def test_config_json_names_what_the_tokenizer_does_not(tmp_path: Path) -> None:
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000, "unk_token_id": None}
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>"}')
    (tmp_path / "chat_template.jinja").write_text("from a file")
    found = read_special_tokens(tmp_path, {}, config, 32000)
    assert found.ids == {"bos": 1, "eos": 2}  # 32000 is no token of 32000
    assert found.added == {"bos": True}
    assert found.chat_template == "from a file"


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


@pytest.mark.parametrize(
    ("rules", "ignore_merges", "name"),
    [
        (pre_tokenizers.ByteLevel(False), False, "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
            ),
            False,
            "smollm",
        ),
        (gguf_tokenizers.split(r"\p{N}"), False, "qwen2"),
        (gguf_tokenizers.split(r"\p{N}{1,3}"), True, "llama-bpe"),
        (gguf_tokenizers.split(r"\p{N}{1,3}"), False, "smaug-bpe"),
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
    assert tokenizer.tokens[1024:] == [f"[PAD{i}]".encode() for i in range(1024, 1030)]
    assert tokenizer.types[:3] == [sentencepiece.PieceType.CONTROL] * 3
    assert (
        tokenizer.types[3:]
        == [sentencepiece.PieceType.NORMAL] * 1021 + [sentencepiece.PieceType.UNUSED] * 6
    )
    with pytest.raises(ConversionError, match=r"has id 10\d\d, but the embedding has 1000 rows"):
        read_tokenizer(checkpoint, 1000)


def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", num_hidden_layers=1)
    description = json.loads((directory / "tokenizer.json").read_text())
    for change, message in (
        ({"model": {"type": "WordPiece", "vocab": {}}}, "unsupported tokenizer .WordPiece."),
        ({"normalizer": {"type": "Lowercase"}}, "cannot normalize text .* .Lowercase."),
    ):
        (directory / "tokenizer.json").write_text(json.dumps(description | change))
        with pytest.raises(ConversionError, match=message):
            read_tokenizer(Checkpoint.open(directory), 1024)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not JSON"):
        read_tokenizer(Checkpoint.open(directory), 1024)
