from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval import utils as lm_eval_utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from pyarrow import Table
from pyarrow.parquet import write_table
from transformers import AutoModelForCausalLM

from quantkit.engines.base import Scorer
from quantkit.engines.transformers import TransformersScorer
from quantkit.errors import EvaluationError, RecipeError
from quantkit.evaluation import tasks
from quantkit.evaluation.language_model import EngineLM
from quantkit.evaluation.questions import LETTERS, csv_questions, dev_questions
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.tokenizer import load_tokenizer
from tests.models import VOCABULARY

MMLU = "mmlu_csv"


@pytest.fixture
def language_model(tiny_llama: Path) -> Callable[[int], EngineLM]:
    source = Checkpoint.open(tiny_llama)

    def make(max_length: int) -> EngineLM:
        return EngineLM(
            lambda context: TransformersScorer(source, context),
            source.tokenizer,
            max_length,
            "test",
        )

    return make


@pytest.fixture(scope="module")
def hf(tiny_llama: Path) -> HFLM:
    """lm-eval's own model class."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return HFLM(
        pretrained=model, tokenizer=load_tokenizer(tiny_llama), batch_size=1, max_length=2048
    )


@pytest.fixture(scope="module")
def mmlu_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dev questions that lm-eval carries, in the CSV layout, as both dev and test."""
    out = tmp_path_factory.mktemp("mmlu")
    for split in ("dev", "test"):
        (out / split).mkdir()
        for subject in {question["subject"] for question in dev_questions()}:
            name = f"{subject.replace(' ', '_')}_{split}.csv"
            with (out / split / name).open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(
                    [q["question"], *q["choices"], LETTERS[q["answer"]]]
                    for q in dev_questions()
                    if q["subject"] == subject and len(q["choices"]) == 4
                )
    return out


def _refuse(context: int) -> AbstractContextManager[Scorer]:
    raise AssertionError("the model was loaded")


def _requests(kind: str, *arguments: tuple[str, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_every_dev_question_is_read() -> None:
    questions = dev_questions()
    assert len({q["subject"] for q in questions}) == 57
    # lm-eval 0.4.13 lacks one each of college_chemistry, formal_logic and human_aging.
    assert len(questions) == 282
    for question in questions:
        assert question["question"]
        assert len(question["choices"]) in (4, 5)
        assert all(question["choices"])
        assert 0 <= question["answer"] < len(question["choices"])
    assert sum(len(q["choices"]) == 5 for q in questions) == 1


def test_dev_questions_are_the_published_ones(shared_data: Path) -> None:
    """Same question, same choices, same key, but for what lm-eval's authors mended by hand."""

    def letters(text: str) -> str:
        return re.sub(r"\W+", "", text).casefold()

    different = 0
    for path in sorted((shared_data / "mmlu" / "dev").glob("*_dev.csv")):
        subject = path.stem.removesuffix("_dev").replace("_", " ")
        published = {
            (letters(q["question"]), *map(letters, q["choices"]), q["answer"])
            for q in csv_questions(path)
        }
        found = {
            (letters(q["question"]), *map(letters, q["choices"]), q["answer"])
            for q in dev_questions()
            if q["subject"] == subject
        }
        assert len(found) >= 4
        different += len(found - published)
    assert different == 8


def test_prompts_are_those_of_lm_evals_own_mmlu(mmlu_directory: Path) -> None:
    """``mmlu_csv`` is lm-eval's ``mmlu`` on other files: ours must ask in the same letters."""
    theirs = tasks.load_task("mmlu_csv", {MMLU: str(mmlu_directory)}, None)["tasks"]
    ours = tasks.load_task("mmlu_dev", {}, None)["tasks"]["mmlu_dev"]
    assert len(theirs) == 57
    compared = 0
    for doc in ours.test_docs():
        if len(doc["choices"]) != 4:
            continue
        task = theirs["mmlu_" + doc["subject"].replace(" ", "_")]
        asked = (doc["question"], doc["choices"])
        twin = next(d for d in task.test_docs() if (d["question"], d["choices"]) == asked)
        assert ours.fewshot_context(doc, 0) == task.fewshot_context(twin, 0)
        assert ours.doc_to_choice(doc) == task.doc_to_choice(twin)
        assert ours.doc_to_target(doc) == task.doc_to_target(twin)
        compared += 1
    assert compared == 281


def test_answers_are_those_of_lm_evals_own_model(tiny_llama: Path, hf: HFLM) -> None:
    source = Checkpoint.open(tiny_llama)
    found = tasks.run_task(
        "mmlu_dev", lambda n: TransformersScorer(source, n), source.tokenizer, 2048, limit=20
    )
    expected = lm_eval.simple_evaluate(
        hf, tasks=["mmlu_dev"], task_manager=tasks._task_manager("mmlu_dev", ()), limit=20
    )
    samples = expected["samples"]["mmlu_dev"]
    assert len(found.answers) == len(samples) == 20
    for answer, sample in zip(found.answers, samples, strict=True):
        theirs = [likelihood for likelihood, _ in sample["filtered_resps"]]
        ours = answer["loglikelihoods"]
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert ours.index(max(ours)) == theirs.index(max(theirs))
    metric = found.metrics["mmlu_acc"]
    assert metric.value == expected["results"]["mmlu_dev"]["acc,none"]
    assert metric.stderr == pytest.approx(expected["results"]["mmlu_dev"]["acc_stderr,none"])
    assert metric.n == 20
    assert found.protocol["shots"] == [0]


def test_shots_are_of_the_questions_subject(mmlu_directory: Path, tiny_llama: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    result = tasks.run_task(
        "mmlu_csv",
        lambda n: TransformersScorer(source, n),
        source.tokenizer,
        2048,
        shots=1,
        limit=1,
        data={MMLU: str(mmlu_directory)},
    )
    assert result.metrics["mmlu_acc"].n == 57
    assert result.protocol["shots"] == [1]
    assert result.protocol["version"] == "2"
    loaded = tasks.load_task("mmlu_csv", {MMLU: str(mmlu_directory)}, 1)["tasks"]
    task = loaded["mmlu_anatomy"]
    prompt = task.fewshot_context(task.test_docs()[1], 1)
    assert task.test_docs()[0]["question"].strip() in prompt


def test_likelihoods_of_long_and_short_continuations(
    hf: HFLM, language_model: Callable[[int], EngineLM]
) -> None:
    """Trailing spaces, an empty context, shared beginnings: as lm-eval's own model has them."""
    requests = _requests(
        "loglikelihood",
        ("The quick brown", " fox jumps over"),
        ("The quick brown", " fox"),
        ("The quick brown ", "fox"),
        ("", "The quick brown fox"),
        ("<|im_start|>user", " said"),
        ("The quick brown", " dog"),
    )
    found = language_model(2048).loglikelihood(requests)
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-3)
        assert ours[1] == theirs[1]


@pytest.mark.parametrize("max_length", [2048, 50])
def test_rolling_likelihood_of_whole_texts(
    hf: HFLM, language_model: Callable[[int], EngineLM], max_length: int
) -> None:
    texts = ["for x in range(10): print(x)", "The import statement " * 40]
    requests = _requests("loglikelihood_rolling", *((text,) for text in texts))
    before, hf._max_length = hf._max_length, max_length
    try:
        expected = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    finally:
        hf._max_length = before
    found = language_model(max_length).loglikelihood_rolling(requests)
    assert found == pytest.approx(expected, abs=1e-2)


class _Counting(Scorer):
    """Uniform logits; notes what it is asked for. NaN where ``bad``."""

    def __init__(self, bad: bool = False) -> None:
        self.asked: list[list[int]] = []
        self.positions = 0
        self.bad = bad

    def logits(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> Iterator[torch.Tensor]:
        self.asked = [list(sequence) for sequence in sequences]
        for sequence, start in zip(sequences, first, strict=True):
            self.positions += len(sequence) - start
            rows = torch.zeros(len(sequence) - start, VOCABULARY)
            yield rows * torch.nan if self.bad else rows


def _run_dev(scorer: _Counting, tiny_llama: Path) -> tasks.TaskResult:
    @contextmanager
    def opened(context: int) -> Iterator[Scorer]:
        yield scorer

    return tasks.run_task("mmlu_dev", opened, load_tokenizer(tiny_llama), 2048)


def test_the_choices_of_a_question_stand_side_by_side(tiny_llama: Path) -> None:
    scorer = _Counting()
    result = _run_dev(scorer, tiny_llama)
    # One question stands twice in the data: 281 different prompts, one of them with 5 choices.
    assert len({tuple(ids) for ids in scorer.asked}) == 281
    assert len(scorer.asked) == scorer.positions == 4 * 281 + 1
    assert sum(one != other for one, other in pairwise(scorer.asked)) == 280
    # All choices tie, and the first is taken: the share of questions whose answer is A.
    share = sum(q["answer"] == 0 for q in dev_questions()) / 282
    assert result.metrics["mmlu_acc"].value == pytest.approx(share)
    assert result.metrics["mmlu_acc"].n == 282


def test_a_template_is_compiled_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    templates = lm_eval_utils.env
    plain = templates.from_string
    compiled = []

    def count(template: str) -> Any:
        compiled.append(template)
        return plain(template)

    monkeypatch.setattr(templates, "from_string", count)
    _run_dev(_Counting(), tiny_llama)
    assert compiled
    assert len(compiled) == len(set(compiled))
    assert templates.from_string is count


def test_answers_keep_who_was_right_where(tiny_llama: Path) -> None:
    (found,) = tasks.answers(_run_dev(_Counting(), tiny_llama)).values()
    assert found.right == [q["answer"] == 0 for q in dev_questions()]
    assert found.picks == [0] * 282
    assert found.subjects == [q["subject"] for q in dev_questions()]


def test_non_finite_answers_are_counted_not_scored(tiny_llama: Path) -> None:
    with pytest.raises(EvaluationError, match="non-finite likelihoods in 1125 of 1125 seq"):
        _run_dev(_Counting(bad=True), tiny_llama)


def test_a_file_that_is_not_there(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such file"):
        tasks.run_task("nowhere.yaml", _refuse, load_tokenizer(tiny_llama), 2048)


def test_csv_that_is_not_mmlu_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "x_test.csv"
    path.write_text("Q,a,b,c,d,A\nQ,a,b,c,A\n")
    with pytest.raises(EvaluationError, match="row 2: expected a question, four choices"):
        csv_questions(path)


def test_a_copy_of_the_hubs_mmlu_is_asked_in_the_same_words(
    mmlu_directory: Path, tmp_path: Path
) -> None:
    """Parquet with its authors' questions: the same prompts, shots and all."""
    theirs = tasks.load_task("mmlu_csv", {MMLU: str(mmlu_directory)}, 2)["tasks"]
    for name, task in theirs.items():
        place = tmp_path / name.removeprefix("mmlu_")
        place.mkdir()
        for split, docs in (("dev", task.fewshot_docs()), ("test", task.test_docs())):
            rows = [{**doc, "subject": name} for doc in docs]
            write_table(Table.from_pylist(rows), place / f"{split}-00000-of-00001.parquet")
    found = tasks.load_task("mmlu_csv", {MMLU: str(tmp_path)}, 2)["tasks"]
    assert found.keys() == theirs.keys()
    for name, task in theirs.items():
        for ours, own in zip(found[name].test_docs(), task.test_docs(), strict=True):
            assert found[name].fewshot_context(ours, 2) == task.fewshot_context(own, 2)
            assert found[name].doc_to_target(ours) == task.doc_to_target(own)
    next(tmp_path.glob("anatomy/test-*")).unlink()
    with pytest.raises(EvaluationError, match=r"anatomy: expected test-\*\.parquet with question"):
        tasks.load_task("mmlu_csv", {MMLU: str(tmp_path)}, 2)


def test_csv_without_a_directory_says_what_to_give() -> None:
    with pytest.raises(EvaluationError, match="--eval-data mmlu_csv=PATH"):
        tasks.load_task("mmlu_csv", {}, None)
