"""Answers to the user's own prompts: against a slow loop without caches, and by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.engines.transformers import TransformersScorer
from quantkit.errors import EngineError, EvaluationError
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.plan import EvaluationPlan
from quantkit.evaluation.prompt_file import Prompt, Prompts, read_prompts
from quantkit.evaluation.prompt_pairs import Pair, pair, summarize
from quantkit.evaluation.prompt_reference import ReferenceAnswers
from quantkit.evaluation.statistics import clustered_mean, mean
from quantkit.ledger import require_comparable
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from tests.models import make_noisy

TOKENS = 12
LINES = [
    {"prompt": "The for statement", "category": "python"},
    {"prompt": "A module is", "category": "python"},
    {"prompt": "import os\n", "category": "code"},
    {"messages": [{"role": "user", "content": "What is a class?"}]},
    {"prompt": "The for statement is used", "category": "code"},
]


@pytest.fixture(scope="module")
def source(tiny_llama: Path) -> Checkpoint:
    return Checkpoint.open(tiny_llama)


@pytest.fixture(scope="module")
def prompts(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return read_prompts(path, source.tokenizer, source.path, max_tokens=TOKENS, max_length=2048)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def reference(source: Checkpoint, prompts: Prompts, cache: Path) -> ReferenceAnswers:
    return ReferenceAnswers.build(source, prompts, cache)


@pytest.fixture(scope="module")
def plan(source: Checkpoint) -> EvaluationPlan:
    return EvaluationPlan(source.tokenizer, 2048)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The source with a little noise on its weights."""
    return Checkpoint.open(make_noisy(tmp_path_factory.mktemp("other") / "noisy", 0.0015))


def slow_answer(scorer: TransformersScorer, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Everything computed anew for each token."""
    ids = list(prompt)
    for _ in range(TOKENS):
        (logits,) = scorer.logits([ids], [len(ids) - 1])
        ids.append(int(logits[0].argmax()))
        if ids[-1] == 2:
            break
    return tuple(ids[len(prompt) :])


def test_a_variant_against_a_slow_loop(
    source: Checkpoint,
    other: Checkpoint,
    prompts: Prompts,
    reference: ReferenceAnswers,
    plan: EvaluationPlan,
    tmp_path: Path,
) -> None:
    whole = evaluate(other, {}, plan, tmp_path, reference)
    found = {name.removeprefix("prompts_"): one for name, one in whole.metrics.items()}
    same, places, klds = [], [], []
    with TransformersScorer(source, 2048) as p, TransformersScorer(other, 2048) as q:
        for one in prompts.entries:
            known, given = slow_answer(p, one.ids), slow_answer(q, one.ids)
            same.append(known == given)
            if known != given:
                places.append(next(i for i in range(TOKENS) if known[i] != given[i]) + 1)
            klds.append([])
            for t in range(len(known)):
                read = [*one.ids, *known[:t]]
                (a,), (b,) = p.logits([read], [len(read) - 1]), q.logits([read], [len(read) - 1])
                log_p, log_q = a[0].double().log_softmax(0), b[0].double().log_softmax(0)
                klds[-1].append(float((log_p.exp() * (log_p - log_q)).sum()))
    assert 0 < sum(same) < len(same)
    assert found["exact_match"].value == sum(same) / len(same)
    assert whole.prompts is not None
    assert whole.prompts.overall.first_difference_mean == sum(places) / len(places)
    tokens = [kld for one in klds for kld in one]
    assert found["kld_mean"].value == pytest.approx(sum(tokens) / len(tokens), rel=1e-3)
    assert found["kld_mean"].n == found["answer_tokens"].n == len(LINES)
    kept = json.loads((tmp_path / "prompts.json").read_text())
    for one, hits, kld in zip(kept, same, klds, strict=True):
        assert one["exact_match"] == hits
        assert one["kld"] == pytest.approx(kld, rel=2e-3, abs=1e-7)
    assert [(one.category, one.n) for one in whole.prompts.categories] == [
        ("python", 2), ("code", 2), (None, 1),
    ]  # fmt: skip
    worst = whole.prompts.most_different
    assert [one.kld for one in worst] == sorted((one.kld for one in worst), reverse=True)
    assert len(worst) == len(places)


def test_the_reference_against_itself(
    source: Checkpoint, reference: ReferenceAnswers, plan: EvaluationPlan
) -> None:
    found = evaluate(source, {}, plan, answers=reference)
    values = {name: one.value for name, one in found.metrics.items()}
    tokens = sum(map(len, reference.answers)) / len(LINES)
    assert values == {
        "prompts_exact_match": 1, "prompts_text_match": 1, "prompts_kld_mean": 0,
        "prompts_answer_tokens": tokens,
    }  # fmt: skip
    assert found.prompts is None


def test_a_copy_is_run_and_says_the_same(
    source: Checkpoint, reference: ReferenceAnswers, plan: EvaluationPlan, tmp_path: Path
) -> None:
    """The same weights as another model: nothing is taken from the stored answers."""
    shutil.copytree(source.path, tmp_path / "copy")
    (tmp_path / "copy" / "special_tokens_map.json").write_text("{}")
    copy = Checkpoint.open(tmp_path / "copy")
    assert not reference.is_of(copy)
    found = evaluate(copy, {}, plan, answers=reference)
    assert found.metrics["prompts_exact_match"].value == 1
    assert found.metrics["prompts_kld_mean"].value == pytest.approx(0, abs=1e-9)
    assert found.prompts is not None
    assert found.prompts.most_different == []
    own = evaluate(source, {}, plan, answers=reference)
    for name in own.metrics:
        require_comparable(name, own.metrics[name], found.metrics[name])


def test_a_gguf_answers_in_llama_cpp(
    source: Checkpoint, reference: ReferenceAnswers, plan: EvaluationPlan, tmp_path: Path
) -> None:
    variant = convert(source, Spec.parse("gguf:F32"), None, tmp_path)
    metrics = evaluate(variant, {}, plan, answers=reference).metrics
    assert metrics["prompts_kld_mean"].engine.name == "llamacpp"
    assert 0 < metrics["prompts_kld_mean"].value < 1e-4
    assert metrics["prompts_exact_match"].value >= 0.8


def test_the_reference_answers_once(
    source: Checkpoint,
    prompts: Prompts,
    reference: ReferenceAnswers,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(list(cache.iterdir())) == 1
    inputs = [*prompts.entries[2].ids, *reference.answers[2][:-1]]
    with TransformersScorer(source, 64) as scorer:
        (logits,) = scorer.logits([inputs], [len(prompts.entries[2].ids) - 1])
    torch.testing.assert_close(reference.logits(2), logits, rtol=1e-4, atol=1e-4)

    def refuse(self: TransformersScorer) -> TransformersScorer:
        raise AssertionError("the reference was run again")

    monkeypatch.setattr(TransformersScorer, "__enter__", refuse)
    again = ReferenceAnswers.build(source, prompts, cache)
    assert again.answers == reference.answers
    assert all(map(torch.equal, again.hidden, reference.hidden))
    shorter = Prompts(prompts.entries, prompts.ends, TOKENS - 1, prompts.template_sha256)
    with pytest.raises(AssertionError, match="run again"):
        ReferenceAnswers.build(source, shorter, cache)


def test_non_finite_values_fail_with_their_count(
    source: Checkpoint,
    prompts: Prompts,
    reference: ReferenceAnswers,
    plan: EvaluationPlan,
    tmp_path: Path,
) -> None:
    path = tmp_path / "damaged"
    shutil.copytree(source.path, path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][7] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    damaged = Checkpoint.open(path)
    n = sum(map(len, reference.answers))
    with pytest.raises(EvaluationError, match=f"non-finite logits at {n} of {n} tokens"):
        evaluate(damaged, {}, plan, answers=reference)
    with pytest.raises(EngineError, match="not numbers"):
        ReferenceAnswers.build(damaged, prompts, tmp_path)
    assert list(tmp_path.glob("*.safetensors")) == []


def by_hand(
    source: Checkpoint, category: str | None, one: list[int], two: list[int], *kld: float
) -> Pair:
    prompt = Prompt(1, "x", category, "Say something", (5, 6))
    values = torch.tensor(kld, dtype=torch.float64)
    return pair(prompt, tuple(one), tuple(two), values, source.tokenizer)


def test_a_summary_by_hand(source: Checkpoint) -> None:
    """Answers of two, four and one tokens; 2 ends them."""
    prompts = Prompts((), (2,), 4)
    pairs = [
        by_hand(source, "a", [300, 2], [300, 2], 0.0, 0.1),
        by_hand(source, None, [300, 301, 302, 303], [300, 301, 305, 2], 0.1, 0.2, 0.3, 0.6),
        by_hand(source, "a", [300, 303, 2], [2], 0.5, 0.7, 0.0),
    ]
    found = summarize(pairs, prompts, source.tokenizer)
    whole, (a, none) = found.overall, found.categories
    assert (whole.n, a.category, a.n, none.category, none.n) == (3, "a", 2, None, 1)
    assert whole.exact_match == pytest.approx(1 / 3)
    assert whole.exact_match_stderr == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 2))
    assert (whole.first_difference_mean, whole.first_difference_median) == (2, 2)  # of 3 and 1
    assert (a.first_difference_mean, none.first_difference_mean) == (1, 3)
    # Sums 0.1, 1.2 and 1.2 over 2, 4 and 3 tokens: 2.5 / 9, and what is left of each sum.
    rest = [0.1 - 2 * 2.5 / 9, 1.2 - 4 * 2.5 / 9, 1.2 - 3 * 2.5 / 9]
    assert whole.kld_mean == pytest.approx(2.5 / 9)
    assert whole.kld_stderr == pytest.approx(math.sqrt(1.5 * sum(x * x for x in rest)) / 9)
    assert none.kld_stderr is none.exact_match_stderr is None
    assert (whole.reference_tokens, whole.tokens) == (3, pytest.approx(7 / 3))
    assert (whole.reference_cut, whole.cut, a.cut) == (1, 0, 0)
    assert [round(one.kld, 6) for one in found.most_different] == [0.4, 0.3]
    assert summarize(pairs[1:2], prompts, source.tokenizer).categories == []


def test_a_pair_is_split_where_the_tokens_part(source: Checkpoint) -> None:
    """Not where the letters do, which may be later; and nothing of the texts is lost."""
    tokenizer = source.tokenizer
    texts = ("The module is\nimported", "The module is\nimplicit")
    one, two = (tokenizer(text).input_ids for text in texts)
    alike = sum(a == b for a, b in zip(one, two, strict=False))
    drift = summarize(
        [by_hand(source, None, one, two, *([0.1] * len(one)))], Prompts((), (), 99), tokenizer
    )
    (shown,) = drift.most_different
    assert shown.common == tokenizer.decode(one[:alike])
    assert (shown.common + shown.reference, shown.common + shown.answer) == texts
    assert shown.first_difference == alike + 1
    assert (shown.prompt, shown.id) == ("Say something", "x")


def test_long_texts_are_cut_visibly(source: Checkpoint) -> None:
    ids = source.tokenizer("word " * 400).input_ids
    ends = [source.tokenizer(text * 200).input_ids for text in ("yes ", "no ")]
    answers = [[*ids, *end] for end in ends]
    pairs = [by_hand(source, None, *answers, *([0.1] * len(answers[0])))]
    (shown,) = summarize(pairs, Prompts((), (), 9), source.tokenizer).most_different
    assert shown.common.startswith("…")
    assert shown.reference.endswith("…")
    assert len(shown.common) < 300
    assert len(shown.answer) < 500


def test_the_same_text_in_other_tokens_is_no_different_answer(source: Checkpoint) -> None:
    whole = source.tokenizer("module").input_ids
    letters = [i for letter in "module" for i in source.tokenizer(letter).input_ids]
    assert len(whole) < len(letters)
    pairs = [by_hand(source, None, [*whole, 2], letters, *([0.1] * (len(whole) + 1)))]
    found = summarize(pairs, Prompts((), (2,), 9), source.tokenizer)
    assert (found.overall.exact_match, found.overall.text_match) == (0, 1)
    assert found.most_different == []


def test_the_error_of_a_mean_over_answers_is_what_it_says() -> None:
    """Answers of 5 to 60 tokens, each with a level of its own: against how means really spread."""
    generator = torch.Generator().manual_seed(0)
    means, errors, naive = [], [], []
    for _ in range(1500):
        sizes = torch.randint(5, 60, (40,), generator=generator)
        levels = torch.randn(40, generator=generator)
        clusters = [
            level + torch.randn(int(size), generator=generator)
            for size, level in zip(sizes, levels, strict=True)
        ]
        found = clustered_mean(clusters)
        assert found.stderr is not None
        means.append(found.value)
        errors.append(found.stderr)
        naive.append(mean(torch.cat(clusters)).stderr)
    spread = float(torch.tensor(means).std())
    assert float(torch.tensor(errors).mean()) == pytest.approx(spread, rel=0.06)
    assert float(torch.tensor(naive).mean()) < spread / 3
    single = torch.tensor([1.0, 2.0, 4.0])
    assert clustered_mean(list(single.split(1))).stderr == pytest.approx(mean(single).stderr)
    assert clustered_mean([single]).stderr is None


def test_the_output_layer_is_stored_only_where_the_checkpoint_lacks_it(
    source: Checkpoint,
    prompts: Prompts,
    reference: ReferenceAnswers,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (path,) = cache.iterdir()
    assert "output" not in load_file(path)
    weight = TransformersScorer.output_weight
    scaled = property(lambda scorer: weight.fget(scorer) * 3)  # type: ignore[misc]
    monkeypatch.setattr(TransformersScorer, "output_weight", scaled)
    other = ReferenceAnswers.build(source, prompts, tmp_path)
    assert torch.equal(other.output, reference.output * 3)
    assert torch.equal(ReferenceAnswers.build(source, prompts, tmp_path).output, other.output)
