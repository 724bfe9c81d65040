"""Variants that somebody else made in a run: the same comparison, nothing made, nothing copied."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest

from quantkit.errors import EvaluationError, RecipeError
from quantkit.evaluation.tokenizer_match import require_same_tokens
from quantkit.formats.detect import open_variant
from quantkit.ledger import Row
from quantkit.models import hub
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from quantkit.runs import pipeline
from quantkit.runs.external import ExternalVariant
from quantkit.runs.recipe import Recipe
from tests.models import make_checkpoint
from tests.packed_checkpoints import as_compressed, draw, write

QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64},
        }
    },
}


TEXT = "pydoc:evaluation"


@pytest.fixture
def theirs(tiny_llama: Path, tmp_path: Path) -> Path:
    """One linear of the tiny Llama as 4-bit noise; its tokenizer saved by another version."""
    name = "model.layers.0.self_attn.q_proj"
    parts = as_compressed(draw((256, 256), 4, 4), 4, asymmetric=True)
    path = write(tiny_llama, tmp_path / "theirs", {name: parts}, QUANTIZATION)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1) + "\n")
    return path


def run(source: Path, out: Path, *entries: object) -> dict[str, Row]:
    recipe = Recipe.model_validate(
        {
            "name": "brought",
            "source": str(source),
            "convert": list(entries),
            "evaluate": {"texts": [TEXT], "windows": 1, "context": 64},
            "bench": None,
        }
    )
    return {row.id: row for row in pipeline.run(recipe, out).variants}


def test_it_stands_in_the_same_comparison(
    theirs: Path, tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = Checkpoint.open(tiny_llama), tmp_path / "run"
    file = convert(source, Spec.parse("gguf:Q8_0"), None, tmp_path / "elsewhere").weights
    shutil.move(file, tmp_path / "model-Q8_0.gguf")
    other = make_checkpoint(tmp_path / "other")
    shutil.copytree(theirs, tmp_path / "wrong")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    one, two = list(tokens)[500:502]
    tokens[one], tokens[two] = tokens[two], tokens[one]
    (tmp_path / "wrong" / "tokenizer.json").write_text(json.dumps(vocabulary))
    entries = (
        {"path": str(theirs), "name": "packed"},
        "gguf:Q8_0",
        {"path": str(tmp_path / "model-Q8_0.gguf")},
        {"path": str(tmp_path / "wrong")},
    )
    rows = run(tiny_llama, out, *entries)
    assert list(rows) == ["reference", "packed", "gguf-Q8_0", "model-Q8_0", "wrong"]
    packed, made, brought, wrong = (rows[name] for name in list(rows)[1:])
    assert (packed.spec, packed.path) == ("compressed-tensors:w4g64", str(theirs))
    assert packed.convert is None
    assert packed.notes == [f"not made here: {theirs}"]
    # Words, scales of 32 bits and packed zeros; 2 x 8 bytes of shape.
    expected = 4 + (32 + 4) / 64 + 2 * 64 / (256 * 256)
    assert packed.bits_per_weight_quantized == pytest.approx(expected, rel=1e-9)
    assert packed.texts[TEXT].metrics["kld_mean"].value > 1e-3
    # The same file gives the same numbers, wherever it comes from.
    assert brought.bits_per_weight == pytest.approx(made.bits_per_weight)
    assert brought.texts[TEXT].metrics["kld_mean"] == made.texts[TEXT].metrics["kld_mean"]
    assert wrong.path == str(tmp_path / "wrong")
    assert wrong.failed is not None
    assert wrong.failed.stage == "open"
    assert "its tokenizer.json differs from that of" in wrong.failed.error
    assert sorted(path.name for path in (out / "variants").iterdir()) == ["gguf-Q8_0"]

    # Results are found again by the files' hashes, and not for other files.
    capfd.readouterr()
    again = run(tiny_llama, out, *entries)
    assert again["packed"].texts == packed.texts
    assert "packed-evaluate: done already" in capfd.readouterr().err
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    changed = run(tiny_llama, out, *entries[:1])
    before, after = (one.texts[TEXT].metrics["kld_mean"] for one in (packed, changed["packed"]))
    assert after.value != before.value


def test_a_vocabulary_inside_a_gguf_is_compared(tiny_llama: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    variant = convert(source, Spec.parse("gguf:Q8_0"), None, tmp_path)
    require_same_tokens(source, variant)
    data = variant.weights.read_bytes()
    assert data.count(b"<|im_end|>") >= 1
    variant.weights.write_bytes(data.replace(b"<|im_end|>", b"<|im_END|>"))
    with pytest.raises(
        EvaluationError, match=r"vocabulary inside \('<\|im_end\|>', here '<\|im_END"
    ):
        require_same_tokens(source, open_variant(variant.weights))


def test_of_the_hub_safetensors_alone_are_fetched(
    theirs: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = {}

    def snapshot(
        name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns, not_=ignore_patterns)
        return str(theirs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    entry = ExternalVariant.of_entry({"path": "org/model-AWQ@v1"})
    entry.check(Checkpoint.open(tiny_llama))
    assert entry.directory == "model-AWQ"
    assert entry.open(Checkpoint.open(tiny_llama)).id == "model-AWQ"
    assert (asked["name"], asked["revision"]) == ("org/model-AWQ", "v1")
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["patterns"])
    assert any(fnmatch("consolidated.00-of-01.safetensors", pattern) for pattern in asked["not_"])
    assert not any(fnmatch("model-00001-of-00002.safetensors", one) for one in asked["not_"])
    assert hub.names_hub("org/model")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "./absent"}, r"path \./absent: no such directory or file, and not a hub id"),
        ({"path": "./absent", "iters": 3}, r"is measured as it is, so it takes no `iters`"),
        ({"path": 3}, r"path 3: expected a directory, a file or a hub id"),
        ({"path": "./a b"}, r"name 'a b': it becomes a directory"),
        ({"path": "./x", "name": "reference"}, r"name 'reference'"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said_at_once(
    entry: dict[str, object], message: str, tiny_llama: Path
) -> None:
    source = Checkpoint.open(tiny_llama)
    with pytest.raises(RecipeError, match=message):
        ExternalVariant.of_entry(entry).check(source)
