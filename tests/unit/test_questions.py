"""Where the questions of our tasks come from, and what is said where there are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets.config
import pytest
import torch
from lm_eval.tasks.wikitext import preprocess_wikitext

from quantkit.engines.base import LanguageModel, Scorer
from quantkit.engines.vllm import VLLM
from quantkit.errors import EvaluationError
from quantkit.evaluation import tasks
from quantkit.evaluation.perplexity import windows
from quantkit.evaluation.plan import EvaluationPlan
from quantkit.evaluation.questions import json_lines, wikitext_file
from quantkit.evaluation.task_files import digests
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.engine_config import EngineConfig
from quantkit.models.tokenizer import load_tokenizer
from quantkit.system.packaged import packaged_directory
from tests.models import VOCABULARY

WIKITEXT = (
    " \n = One = \n \n A b @-@ c , d . \n \n = = Part = = \n \n E . \n \n = Two = \n \n F g . \n"
)


class _Even(Scorer):
    """All tokens are equally likely."""

    def logits(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        for sequence, start in zip(sequences, first, strict=True):
            yield torch.zeros(len(sequence) - start, VOCABULARY)


@contextmanager
def _even(context: int) -> Iterator[LanguageModel]:
    assert context > 0
    yield _Even()


def _refuse(context: int) -> AbstractContextManager[LanguageModel]:
    raise AssertionError(f"the model was loaded for {context}")


def test_the_template_runs_as_it_is_and_as_a_copy(tiny_llama: Path, tmp_path: Path) -> None:
    """By its name, and copied, renamed and asked for by a path from elsewhere."""
    tokenizer = load_tokenizer(tiny_llama)
    own = tasks.run_task("template", _even, tokenizer, 2048)
    questions = json_lines("template.jsonl", str(packaged_directory("evals")))["test"]
    lengths = [[len(tokenizer.encode(f" {c}")) for c in q["choices"]] for q in questions]
    # Each token costs the same, so the shortest choice is taken.
    right = [
        found.index(min(found)) == q["answer"] for found, q in zip(lengths, questions, strict=True)
    ]
    assert [answer["right"]["template_acc"] for answer in own.answers] == right
    assert own.metrics["template_acc"].value == sum(right) / 4
    assert {answer["subject"] for answer in own.answers} == {"astronomy", "biology"}
    evals = packaged_directory("evals")
    text = (evals / "template.yaml").read_text().replace("task: template", "task: mine")
    (tmp_path / "mine.yaml").write_text(text)
    shutil.copy(evals / "template.jsonl", tmp_path)
    found = tasks.run_task(str(tmp_path / "mine.yaml"), _even, tokenizer, 2048)
    assert found.metrics.keys() == {"mine_acc", "mine_acc_norm"}
    assert found.answers == [
        {
            **answer,
            "task": "mine",
            "right": {"mine_acc": answer["right"]["template_acc"]},
            "pick": {"mine_acc": answer["pick"]["template_acc"]},
        }
        for answer in own.answers
    ]


def test_wikitext_from_a_file_is_lm_evals_task_on_its_articles(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Uniform logits: every token costs ln V, whatever the words; the rest is counting."""
    path = tmp_path / "wiki.test.raw"
    path.write_text(WIKITEXT)
    tokenizer = load_tokenizer(tiny_llama)
    result = tasks.run_task(
        "wikitext_file", _even, tokenizer, 2048, data={"wikitext_file": str(path)}
    )
    pages = [{"page": page} for page in wikitext_file(str(path))["test"]["page"]]
    assert [page["page"].split("\n")[0] for page in pages] == [" = One = ", " = Two = "]
    assert "".join(page["page"] for page in pages).split() == WIKITEXT.split()
    tokens = sum(
        len(tokenizer.encode(preprocess_wikitext.wikitext_detokenizer(page))) for page in pages
    )
    bits = tokens * torch.tensor(float(VOCABULARY)).log2().item()
    size = sum(len(page["page"].encode()) for page in pages)
    assert result.metrics["wikitext_bits_per_byte"].value == pytest.approx(bits / size, rel=1e-5)
    assert result.metrics["wikitext_bits_per_byte"].n == 2
    assert result.metrics.keys() >= {"wikitext_word_perplexity", "wikitext_byte_perplexity"}


def test_the_real_file_has_its_sixty_articles(shared_data: Path) -> None:
    pages = wikitext_file(str(shared_data / "wikitext-2-raw" / "wiki.test.raw"))["test"]["page"]
    assert len(pages) == 60
    assert pages[0].startswith(" = Robert Boulter = ")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"a": 1}\n\n{"a": \n', "line 3: not JSON"),
        ('{"a": 1}\n{"b": 1}\n', "line 2: expected a JSON object with a"),
        ("[1]\n", "line 1: expected a JSON object with a question"),
        ("\n", "no questions"),
    ],
)
def test_lines_that_are_no_questions_are_named(tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "x.jsonl").write_text(lines)
    with pytest.raises(EvaluationError, match=rf"x\.jsonl: {said}"):
        json_lines("x.jsonl", str(tmp_path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"x\.jsonl: cannot be read: .*No such file"):
        json_lines("x.jsonl", str(tmp_path))
    with pytest.raises(EvaluationError, match=r"nowhere\.raw: cannot be read"):
        tasks.load_task("wikitext_file", {"wikitext_file": str(tmp_path / "nowhere.raw")}, None)
    with pytest.raises(EvaluationError, match="--eval-data wikitext_file=PATH"):
        tasks.load_task("wikitext_file", {}, None)


def test_data_of_the_hub_without_a_network(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    path = tmp_path / "hub.yaml"
    path.write_text(
        "task: hub\ndataset_path: nobody/no-such-data\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: [a, b]\n'
        "doc_to_target: answer\n"
    )
    with pytest.raises(
        EvaluationError, match=r"hub\.yaml: its data is not in /.*and the hub cannot be reached"
    ) as error:
        tasks.run_task(str(path), _refuse, load_tokenizer(tiny_llama), 2048)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("attribute", "said"), [("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "shows pictures")]
)
def test_what_quantkit_does_not_ask_is_refused(
    monkeypatch: pytest.MonkeyPatch, attribute: str, said: str
) -> None:
    leaf = SimpleNamespace(**{attribute: True})
    manager = SimpleNamespace(load=lambda _: {"tasks": {"t": leaf}, "groups": {}})
    monkeypatch.setattr(tasks, "_task_manager", lambda *_: manager)
    with pytest.raises(EvaluationError, match=f"t: {said}"):
        tasks.load_task("t", {}, None)


def test_the_templates_say_the_same_of_the_same_file() -> None:
    lines = (packaged_directory("evals") / "template.jsonl").read_text().splitlines()
    assert len(json_lines("template.jsonl", str(packaged_directory("evals")))["test"]) == len(lines)
    for line in map(json.loads, lines):
        assert 0 <= line["answer"] < len(line["choices"])


def test_changed_questions_are_another_key(tmp_path: Path) -> None:
    evals = packaged_directory("evals")
    task, data = tmp_path / "mine.yaml", tmp_path / "data"
    shutil.copy(evals / "template.yaml", task)
    shutil.copy(evals / "template.jsonl", tmp_path)
    (tmp_path / "unrelated.txt").write_text("x")
    (data / "dev").mkdir(parents=True)
    (data / "dev" / "a.csv").write_text("x")
    files = [task, tmp_path / "template.jsonl", data / "dev" / "a.csv"]
    asked = (
        ["mmlu", "template", str(task)],
        {"mmlu_csv": str(data), "absent": str(tmp_path / "n")},
    )
    before = digests(*asked)
    assert before.keys() == set(map(str, files))
    for file in files:
        file.write_text(file.read_text() + " ")
        after = digests(*asked)
        assert after[str(file)] != before[str(file)]
        before = after


def test_a_plan_names_its_engine_or_the_one_that_has_logits(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(tiny_llama)
    monkeypatch.setattr(VLLM, "check", lambda *_: None)
    plan = EvaluationPlan(source.tokenizer, 2048, tasks=("template",))
    assert plan.engine_of(source).name == "transformers"
    assert replace(plan, engine=EngineConfig(name="vllm")).engine_of(source).name == "vllm"
    # The reference of GGUF variants that llama.cpp is asked to measure.
    assert (
        replace(plan, engine=EngineConfig(name="llamacpp")).engine_of(source).name == "transformers"
    )
    text = replace(
        plan,
        engine=EngineConfig(name="vllm"),
        texts={"t": windows(list(range(64)), 32, None, None)},
    )
    with pytest.raises(EvaluationError, match=r"vllm gives no logits .*transformers gives them$"):
        text.engine_of(source)
