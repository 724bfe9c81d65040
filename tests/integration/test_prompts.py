"""The user's own prompts through a whole run: in the ledger, in the report, and found again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from quantkit.cli.main import cli
from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.engines.transformers import TransformersScorer
from quantkit.errors import RecipeError
from quantkit.formats.detect import open_variant
from quantkit.ledger import Ledger
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.variant import Variant
from quantkit.runs import pipeline
from quantkit.runs.recipe import Recipe
from tests import browser

TOKENS = 16
QUESTIONS = ("What is a generator?", "How do I open a file?", "Why is a tuple hashable?")
END = [2]
"""The tiny model's, of its config."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": question}], "category": "</td><b>python"}
        for question in QUESTIONS
    ]
    lines.append({"prompt": "The import statement", "category": "raw", "id": "<i>own</i>"})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def recipe(source: Path, prompts: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "prompts",
            "source": str(source),
            "convert": ["gguf:Q4_0", "gguf:F32"],
            "evaluate": {"texts": [], "prompts": str(prompts), "answer_tokens": TOKENS},
            "bench": None,
        }
    )


@pytest.fixture(scope="module")
def made(tiny_llama: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert not pipeline.run(recipe(tiny_llama, prompts), out).failed
    return out


def test_the_answers_and_the_divergence_are_those_of_transformers_itself(
    tiny_llama: Path, made: Path
) -> None:
    """``generate`` with its cache for the answers; the divergence from one forward pass each."""
    source = Checkpoint.open(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    kept = json.loads((made / "details" / "gguf-Q4_0" / "prompts.json").read_text())
    assert [one["line"] for one in kept] == [1, 2, 3, 4]
    assert [one["id"] for one in kept] == ["1", "2", "3", "<i>own</i>"]
    with LlamaScorer(_variant(made), 512) as variant:
        for one in kept:
            ids = torch.tensor([one["prompt_ids"]])
            answer = model.generate(
                ids, do_sample=False, max_new_tokens=TOKENS, eos_token_id=END, pad_token_id=0
            )[0, ids.shape[1] :]
            assert one["reference_ids"] == answer.tolist()
            assert one["reference_text"] == source.tokenizer.decode(
                answer, skip_special_tokens=True
            )
            whole = torch.cat([ids[0], answer])[:-1]
            with torch.inference_mode():
                p = model(whole[None]).logits[0, ids.shape[1] - 1 :].double().log_softmax(-1)
            (q,) = variant.logits([whole.tolist()], [ids.shape[1] - 1])
            kld = (p.exp() * (p - q.double().log_softmax(-1))).sum(-1)
            # Alone it is computed in other blocks than beside others: a digit of each differs.
            assert one["kld"] == pytest.approx(kld.tolist(), rel=0.15, abs=1e-4)
            assert one["kld_mean"] == pytest.approx(float(kld.mean()), rel=0.05)


def test_the_ledger_and_the_report_have_them(made: Path) -> None:
    ledger = Ledger.read(made / "ledger.json")
    reference, worse, plain = ledger.variants
    assert reference.prompts is None
    assert reference.metrics["prompts_exact_match"].value == 1
    assert reference.metrics["prompts_kld_mean"].value == 0
    assert worse.prompts is not None
    assert plain.prompts is not None
    assert plain.metrics["prompts_kld_mean"].value < 1e-4
    assert worse.metrics["prompts_kld_mean"].value > 1e-3
    assert plain.prompts.overall.exact_match >= worse.prompts.overall.exact_match
    assert worse.prompts.most_different
    assert {one.category for one in worse.prompts.categories} == {"</td><b>python", "raw"}
    protocol = worse.metrics["prompts_kld_mean"].protocol
    assert protocol == reference.metrics["prompts_kld_mean"].protocol
    assert (protocol["prompts"], protocol["max_answer_tokens"], protocol["end_ids"]) == (
        4, TOKENS, END,
    )  # fmt: skip


@pytest.mark.skipif(browser.chromium() is None, reason="no Chromium: apt-get install chromium")
def test_the_report_shows_the_pairs_side_by_side(made: Path) -> None:
    worse = Ledger.read(made / "ledger.json").variants[1]
    assert worse.prompts is not None
    with browser.page() as tab:
        tab.size(1280)
        tab.open(made / "report.html")
        assert tab.complaints == []
        shown = tab.run(
            "[...document.querySelectorAll('#prompts details:first-of-type .pair .sides .says')]"
            ".map(e => [e.textContent, e.getBoundingClientRect().left,"
            " e.querySelector('mark').textContent])"
        )
        for one, left, right in zip(
            worse.prompts.most_different, shown[::2], shown[1::2], strict=True
        ):
            # A carriage return is a line feed to HTML.
            common, reference, answer = (
                text.replace("\r", "\n") for text in (one.common, one.reference, one.answer)
            )
            assert left[0] == common + (reference or "∎")
            assert right[0] == common + (answer or "∎")
            assert right[2] == (answer or "∎")
            assert left[1] < right[1]
        titles = tab.run("[...document.querySelectorAll('.category')].map(e => e.textContent)")
        assert titles[:2] == ["</td><b>python", "raw"]
        assert tab.run("document.querySelectorAll('#prompts b, #prompts i').length") == 0


def test_a_second_run_asks_nobody_and_other_prompts_are_asked_again(
    tiny_llama: Path, prompts: Path, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(self: object) -> None:
        raise AssertionError("a model was run again")

    monkeypatch.setattr(TransformersScorer, "__enter__", refuse)
    monkeypatch.setattr(LlamaScorer, "__enter__", refuse)
    before = Ledger.read(made / "ledger.json")
    again = pipeline.run(recipe(tiny_llama, prompts), made)
    assert [row.prompts for row in again.variants] == [row.prompts for row in before.variants]
    more = tmp_path / "more.jsonl"
    more.write_text(prompts.read_text() + '\n{"prompt": "one more"}')
    with pytest.raises(AssertionError, match="run again"):
        pipeline.run(recipe(tiny_llama, more), made)


def test_the_command_line(tiny_llama: Path, prompts: Path, made: Path, tmp_path: Path) -> None:
    variant = made / "variants" / "gguf-Q4_0"
    command = ["evaluate", variant, "--max-answer-tokens", TOKENS, "--reference", tiny_llama]
    found = json.loads(_quantkit(*command, "--prompts", prompts, "--json"))["models"]["gguf-Q4_0"]
    row = Ledger.read(made / "ledger.json").variants[1]
    assert row.prompts is not None
    assert found["prompts"] == row.prompts.model_dump(mode="json")
    assert found["metrics"]["prompts_kld_mean"]["value"] == row.metrics["prompts_kld_mean"].value

    shown = _quantkit(*command, "--prompts", prompts)
    assert re.search(r"</td><b>python +3 ", shown)
    assert shown.count("another token from") == len(row.prompts.most_different)
    assert all(line.isprintable() for line in shown.split("\n"))
    with pytest.raises(RecipeError, match="give --reference MODEL"):
        _quantkit("evaluate", variant, "--prompts", prompts)


def test_a_bad_line_stops_a_run_before_anything_is_made(tiny_llama: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": ' + json.dumps("long " * 2100) + "}")
    with pytest.raises(RecipeError, match=r"bad\.jsonl:1: \d+ tokens and an answer of up to 16"):
        pipeline.run(recipe(tiny_llama, bad), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _variant(made: Path) -> Variant:
    return open_variant(made / "variants" / "gguf-Q4_0")


def _quantkit(*arguments: object) -> str:
    """What the command prints."""
    ended = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    return ended.stdout
