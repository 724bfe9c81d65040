"""Tasks that ask the model to write, against lm-eval's own model class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from quantkit.engines.base import LanguageModel, TokenScores
from quantkit.engines.transformers import Transformers, TransformersScorer
from quantkit.errors import EvaluationError
from quantkit.evaluation import paired, tasks
from quantkit.evaluation.compare import compare
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.generation import Generation
from quantkit.evaluation.language_model import EngineLM, KeptModel
from quantkit.evaluation.plan import EvaluationPlan
from quantkit.evaluation.samples import Evaluated
from quantkit.ledger import REFERENCE
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.tokenizer import load_tokenizer
from quantkit.system.packaged import packaged_directory

PROMPTS = [
    "The import statement",
    "The import system",
    "for x in range(10):",
    "A class is",
    "<|im_start|>user",
]


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


@pytest.fixture(scope="module")
def hf(tiny_llama: Path) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = load_tokenizer(tiny_llama)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=2048)


def _open(source: Checkpoint) -> Callable[[int], AbstractContextManager[LanguageModel]]:
    return lambda context: TransformersScorer(source, context)


def _ours(source: Checkpoint, max_length: int = 2048, *ends: int) -> EngineLM:
    return EngineLM(_open(source), source.tokenizer, max_length, "test", ends)


def _requests(options: dict[str, Any], prompts: list[str]) -> list[Instance]:
    return [
        Instance("generate_until", {}, (prompt, dict(options)), i)
        for i, prompt in enumerate(prompts)
    ]


def _both(ours: EngineLM, hf: HFLM, options: dict[str, Any]) -> list[str]:
    found = ours.generate_until(_requests(options, PROMPTS))
    assert found == hf.generate_until(_requests(options, PROMPTS), disable_tqdm=True)
    return found


def test_answers_are_those_of_lm_evals_own_model(source: Checkpoint, hf: HFLM) -> None:
    whole = _both(_ours(source), hf, {"until": [], "max_gen_toks": 24})
    assert len(set(whole)) == len(PROMPTS)
    assert _both(_ours(source), hf, {"until": [], "max_gen_toks": 9}) != whole


def test_stop_strings_are_found_across_tokens(source: Checkpoint, hf: HFLM) -> None:
    """A stop string from the middle of one of the answers, which begins and ends inside tokens."""
    whole = _both(_ours(source), hf, {"until": [], "max_gen_toks": 40})
    ids = source.tokenizer.encode(whole[0])
    first, second = (source.tokenizer.decode(ids[:n]) for n in (8, 12))
    stop = second[len(first) - 1 : -1]
    assert stop in whole[0]
    assert stop not in source.tokenizer.get_vocab()
    asked: list[int] = []
    ours = _ours(source)
    found = _both(ours, hf, {"until": [stop, "never written"], "max_gen_toks": 40})
    assert found[0] == whole[0].split(stop)[0]
    # What is over costs nothing more.
    ends = Generation((stop,), 40).ends(source.tokenizer, frozenset())
    with TransformersScorer(source, 128) as model:
        (asked,) = model.generate([ours.tok_encode(PROMPTS[0])], 40, ends)
    assert stop in source.tokenizer.decode(asked)
    assert stop not in source.tokenizer.decode(asked[:-1])


def test_ends_of_turns_from_the_models_own_files(
    tiny_llama: Path, hf: HFLM, tmp_path: Path
) -> None:
    """What the tokenizer does not call EOS, and generation_config.json does."""
    prompt = hf.tok_encode(PROMPTS[0])
    with torch.inference_mode():
        whole = hf.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    written = whole[0, len(prompt) :].tolist()
    end = written[5]
    directory = shutil.copytree(tiny_llama, tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    question = {"question": "x", "choices": ["y"], "answer": 0, "subject": "s"}
    (tmp_path / "template.jsonl").write_text(json.dumps(question))
    text = (packaged_directory("evals") / "template_answers.yaml").read_text()
    for ours, theirs in (
        ('"Question: {{question}}\\nAnswer:"', f'"{PROMPTS[0]}"'),
        ('["\\n", "Question:"]', "[]"),
    ):
        assert ours in text
        text = text.replace(ours, theirs)
    task = tmp_path / "writes.yaml"
    task.write_text(text)
    found = tasks.run_task(
        str(task), _open(Checkpoint.open(directory)), load_tokenizer(directory), 2048
    )
    cut = hf.tokenizer.decode(written[: written.index(end) + 1]).strip()
    assert found.answers[0]["written"] == {"stripped": cut}
    assert cut != hf.tokenizer.decode(written).strip()


def test_prompts_are_cut_on_the_left(source: Checkpoint, hf: HFLM) -> None:
    options = {"until": [], "max_gen_toks": 12}
    long = ["The import statement " * 20]
    before, hf._max_length = hf._max_length, 40
    try:
        expected = hf.generate_until(_requests(options, long), disable_tqdm=True)
    finally:
        hf._max_length = before
    assert _ours(source, 40).generate_until(_requests(options, long)) == expected
    with pytest.raises(EvaluationError, match="up to 50 tokens leaves no room"):
        _ours(source, 40).generate_until(_requests({"max_gen_toks": 50}, long))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"do_sample": True, "temperature": 0.7}, "do_sample: True"),
        ({"temperature": 0.7}, "do_sample: True"),
        ({"num_beams": 4}, "num_beams: 4"),
        ({"repetition_penalty": 1.2, "until": ["\n"]}, "repetition_penalty: 1.2"),
    ],
)
def test_other_than_greedy_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(EvaluationError, match=f"mine: asks for {said}, and quantkit writes"):
        Generation.of(options, "mine")


def test_what_greedy_does_anyway_is_taken() -> None:
    options = {"until": "\n", "do_sample": False, "temperature": 0.0, "top_p": 0.9, "num_beams": 1}
    assert Generation.of(options, "mine") == Generation(("\n",), 256)
    assert Generation.of({"max_new_tokens": 7}, "mine") == Generation((), 7)


@pytest.mark.parametrize("chat", [False, True])
def test_a_whole_task_with_its_metrics(source: Checkpoint, hf: HFLM, chat: bool) -> None:
    """The template of our own: answers, metric and error as lm-eval's own model gets them."""
    found = tasks.run_task("template_answers", _open(source), source.tokenizer, 2048, chat=chat)
    with tasks.quiet():
        loaded = tasks.load_task("template_answers", {}, None)
        expected = lm_eval.evaluate(hf, loaded, apply_chat_template=chat)
    samples = expected["samples"]["template_answers"]
    written = [answer["written"]["stripped"] for answer in found.answers]
    assert [[text] for text in written] == [s["filtered_resps"] for s in samples]
    assert all(written)
    name = "template_answers_exact_match_stripped"
    metric = found.metrics[name]
    assert metric.value == expected["results"]["template_answers"]["exact_match,stripped"]
    assert metric.n == 4
    given = tasks.answers(found)[name]
    assert given.right == [bool(s["exact_match"]) for s in samples]
    assert given.picks == written
    assert given.subjects == ["astronomy"] * 2 + ["biology"] * 2
    assert ("chat_template_sha256" in found.protocol) == chat


class _Written(LanguageModel):
    """Answers each question with a text of its own: ``answers`` by a word of the question."""

    def __init__(self, tokenizer: Any, answers: dict[str, str]) -> None:
        self.tokenizer = tokenizer
        self.answers = answers

    def likelihoods(self, *_: Any) -> Iterator[TokenScores]:
        raise NotImplementedError

    def generate(self, prompts: Sequence[Sequence[int]], *_: Any) -> Iterator[list[int]]:
        for prompt in prompts:
            text = self.tokenizer.decode(prompt)
            (answer,) = (said for word, said in self.answers.items() if word in text)
            yield self.tokenizer.encode(f" {answer}", add_special_tokens=False)


FILTERS = """filter_list:
  - name: first
    filter:
      - {function: regex, regex_pattern: '(\\S+)'}
      - {function: take_first}
  - name: last
    filter:
      - {function: regex, regex_pattern: '(\\S+)$'}
      - {function: take_first}
"""


def test_flips_of_written_answers_are_by_filter_and_subject(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: two ways to read an answer are two measures, each with its own flips."""
    text = (packaged_directory("evals") / "template_answers.yaml").read_text()
    start, end = text.index("filter_list:"), text.index("metric_list:")
    (tmp_path / "mine.yaml").write_text(
        (text[:start] + FILTERS + text[end:]).replace("task: template_answers", "task: mine")
    )
    shutil.copy(packaged_directory("evals") / "template.jsonl", tmp_path)
    answers = {"nearest": "Mercury", "moons": "two", "mammal": "the whale", "bees": "wax"}
    changed = answers | {"nearest": "Mercury or Venus", "moons": "one", "bees": "pollen"}

    def evaluated(said: dict[str, str]) -> Evaluated:
        @contextmanager
        def opened(*_: Any) -> Iterator[LanguageModel]:
            yield _Written(source.tokenizer, said)

        monkeypatch.setattr(Transformers, "language_model", opened)
        plan = EvaluationPlan(source.tokenizer, 2048, tasks=(str(tmp_path / "mine.yaml"),))
        return evaluate(source, {}, plan, details=tmp_path / "details")

    before, after = evaluated(answers), evaluated(changed)
    first, last = "mine_exact_match_first", "mine_exact_match_last"
    assert before.answers.keys() == {first, last}
    assert before.answers[first].right == [True, True, False, False]  # "the" is no whale
    assert before.answers[last].picks == ["Mercury", "two", "whale", "wax"]
    details = json.loads((tmp_path / "details" / "mine.json").read_text())
    assert [answer["written"] for answer in details] == [
        {"first": "Mercury", "last": "Venus"}, {"first": "one", "last": "one"},
        {"first": "the", "last": "whale"}, {"first": "pollen", "last": "pollen"},
    ]  # fmt: skip
    found = {one.measure: one for one in compare({REFERENCE: before, "v": after}, 1.0)}
    for name, lost in ((first, 1), (last, 2)):
        changes, one = found[name].flips, found[name]
        assert changes is not None
        assert (changes.right_to_wrong, changes.wrong_to_right) == (lost, 0)
        assert changes.wrong_to_other == 1  # the bees
        assert one.p == paired.mcnemar(lost, 0)
        assert one.subjects == 2
        assert [(s.subject, s.right_to_wrong, s.n) for s in one.changed_subjects] == [
            ("astronomy", lost, 2)
        ]
        assert one.verdict == "undecided"


def test_chat_without_a_template_is_refused(source: Checkpoint) -> None:
    tokenizer = load_tokenizer(source.path)
    tokenizer.chat_template = None
    with pytest.raises(EvaluationError, match="no chat template"):
        tasks.run_task("template_answers", _open(source), tokenizer, 2048, chat=True)


def test_a_kept_model_is_loaded_again_only_for_much_longer_sequences(source: Checkpoint) -> None:
    events: list[str] = []

    @contextmanager
    def opened(context: int) -> Iterator[LanguageModel]:
        events.append(f"load {context}")
        yield TransformersScorer(source, context)
        events.append("free")

    kept = KeptModel(opened, 8000)
    for context in (100, 2048, 90, 2049, 8001):
        with kept(context):
            events.append(f"ask {context}")
    kept.close()
    assert events == [
        "load 2048", "ask 100", "ask 2048", "ask 90", "free",
        "load 4096", "ask 2049", "free",
        "load 8001", "ask 8001", "free",
    ]  # fmt: skip
