"""Sequences that begin alike, and greedy answers, against the same model one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit.engines.base import Scorer
from quantkit.engines.llamacpp.scorer import LlamaScorer
from quantkit.engines.llamacpp.shared import compute as llamacpp_compute
from quantkit.engines.transformers import TransformersScorer
from quantkit.engines.transformers.shared import compute as transformers_compute
from quantkit.errors import EngineError
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.spec import Spec
from quantkit.producers.convert import convert
from tests.models import VOCABULARY, make_checkpoint

_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
FAMILIES: dict[str, tuple[bool, dict[str, Any]]] = {
    "llama": (True, {}),
    "gpt2": (True, {"n_embd": 128, "n_layer": 2, "n_head": 4}),
    "mistral": (False, {"sliding_window": 64}),
    "gemma3_text": (False, {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 32}),
    "phi3": (
        False,
        {"pad_token_id": 0, "original_max_position_embeddings": 100, "rope_scaling": _LONGROPE},
    ),
}
"""Whether beginnings can be shared, and the config; sequences exceed the windows and lengths."""
GGUF_FAMILIES = ("llama", "gemma3_text")


def _draw(generator: torch.Generator, count: int) -> list[int]:
    drawn: list[int] = torch.randint(VOCABULARY, (count,), generator=generator).tolist()
    return drawn


def _few_shot(questions: int) -> list[list[int]]:
    """Two subjects with shots of their own, questions after them, choices of a few tokens."""
    generator = torch.Generator().manual_seed(1)
    shots = [_draw(generator, 150), _draw(generator, 90)]
    contexts = [own + _draw(generator, 20 + i) for own in shots for i in range(questions)]
    return sorted(context + _draw(generator, n) for context in contexts for n in (1, 3, 3))


def _checkpoint(name: str, factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(factory.mktemp("families") / name, family=name, **FAMILIES[name][1])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=GGUF_FAMILIES)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, LlamaScorer]]:
    """A checkpoint, and llama.cpp with the same weights."""
    path = _checkpoint(request.param, tmp_path_factory)
    out = tmp_path_factory.mktemp("gguf")
    with LlamaScorer(convert(Checkpoint.open(path), Spec.parse("gguf:F32"), None, out), 512) as it:
        yield path, it


def _plain(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _alone(model: Any, sequence: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([sequence])).logits[0]
    return logits


def _sequences() -> tuple[list[list[int]], list[int]]:
    """Some outputs begin in what several sequences share."""
    sequences = _few_shot(questions=5)
    sequences += [sequences[-1], [9, 8, 7], [5]]
    lengths = [1, 5, 200, 2]
    return sequences, [max(0, len(s) - lengths[i % 4]) for i, s in enumerate(sequences)]


def test_shared_beginnings_do_not_change_logits(family: Path) -> None:
    plain = _plain(family)
    sequences, first = _sequences()
    with TransformersScorer(Checkpoint.open(family), 512) as scorer:
        found = list(scorer.logits(sequences, first))
        states = list(scorer.hidden_states(sequences, first))
        output = scorer.output_weight
    assert len(found) == len(states) == len(sequences)
    for i, sequence in enumerate(sequences):
        expected = _alone(plain, sequence)[first[i] :]
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(states[i] @ output.T, expected, rtol=1e-4, atol=1e-4)


def test_only_what_can_be_shared_is(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And windows of one text are never: their numbers are those of the plain way, bit by bit."""
    calls = []

    def count(*arguments: Any) -> Any:
        calls.append(1)
        return transformers_compute(*arguments)

    generator = torch.Generator().manual_seed(2)
    windows = [[1, *_draw(generator, 63)] for _ in range(6)]
    sequences = _few_shot(questions=1)
    with TransformersScorer(Checkpoint.open(family), 512) as scorer:
        monkeypatch.setattr("quantkit.engines.transformers.scorer.compute", count)
        list(scorer.logits(windows, [32] * 6))
        assert not calls
        list(scorer.logits(sequences, [len(s) - 1 for s in sequences]))
    assert bool(calls) == FAMILIES[family.name][0]


def test_each_shared_token_is_computed_once(tiny_llama: Path) -> None:
    sequences = _few_shot(questions=4)
    model = _plain(tiny_llama)
    computed = 0

    def count(_module: Any, arguments: tuple[torch.Tensor, ...], _output: Any) -> None:
        nonlocal computed
        computed += arguments[0].numel()

    model.get_input_embeddings().register_forward_hook(count)
    first = [len(s) - 1 for s in sequences]
    found = [
        (i, step.states[rows])
        for step in transformers_compute(model, sequences, first, 100)
        for i, rows in step.ended
    ]
    assert [i for i, _ in found] == list(range(len(sequences)))
    assert computed == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})


def test_shared_beginnings_in_llama_cpp(
    both: tuple[Path, LlamaScorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers: what is left is the 16-bit KV cache."""
    path, scorer = both
    plain = _plain(path)
    calls = []

    def count(*arguments: Any) -> Any:
        calls.append(1)
        return llamacpp_compute(*arguments)

    monkeypatch.setattr("quantkit.engines.llamacpp.shared.compute", count)
    sequences, first = _sequences()
    sequences += [sequences[-1]] * 70  # more than one batch has room for, and nothing to compute
    first += [0] * 70
    for steps in (512, 48):
        monkeypatch.setattr("quantkit.engines.llamacpp.shared.UBATCH", steps)
        found = list(scorer.logits(sequences, first))
        assert len(found) == len(sequences)
        for i, sequence in enumerate(sequences[:-69]):
            expected = _alone(plain, sequence)[first[i] :]
            near = 3e-2 * float(expected.std())
            torch.testing.assert_close(found[i], expected, rtol=0, atol=near)
        assert all(torch.equal(rows, found[-1]) for rows in found[-70:])
    assert bool(calls) == FAMILIES[path.name][0]


def _prompts() -> list[list[int]]:
    return [[5], *_few_shot(questions=2), list(range(70, 200))]


def _ends(answer: Sequence[int]) -> bool:
    """Somewhere: answers have different lengths."""
    return sum(answer) % 5 == 1


def _check_answers(scorer: Scorer, plain: Any, near: float) -> None:
    """Against a slow loop, which may only take another token where two are as likely."""
    prompts = _prompts()
    answers = list(scorer.generate(prompts, 9, _ends))
    assert len(answers) == len(prompts)
    different = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        expected: list[int] = []
        while len(expected) < 9 and not (expected and _ends(expected)):
            logits = _alone(plain, prompt + expected)[-1]
            expected.append(int(logits.argmax()))
            at = len(expected) - 1
            if at < len(answer) and answer[at] != expected[at]:
                assert logits.max() - logits[answer[at]] < near * logits.std()
                different += 1
                break
        else:
            assert answer == expected
    assert different <= len(prompts) // 4
    assert len({len(answer) for answer in answers}) > 2


def test_answers_are_those_of_a_slow_loop(family: Path) -> None:
    with TransformersScorer(Checkpoint.open(family), 512) as scorer:
        _check_answers(scorer, _plain(family), near=1e-4)


def test_answers_of_llama_cpp(both: tuple[Path, LlamaScorer]) -> None:
    path, scorer = both
    _check_answers(scorer, _plain(path), near=2e-2)


def test_what_is_not_a_prompt_for_an_answer(tiny_llama: Path) -> None:
    with TransformersScorer(Checkpoint.open(tiny_llama), 16) as scorer:
        assert list(scorer.generate([[1], [2]], 0, _ends)) == [[], []]
        assert list(scorer.generate([], 4, _ends)) == []
        with pytest.raises(EngineError, match="10 tokens and an answer of up to 7 do not fit"):
            list(scorer.generate([[1] * 10], 7, _ends))
        with pytest.raises(EngineError, match="an empty prompt"):
            list(scorer.generate([[]], 7, _ends))
        with torch.no_grad():
            scorer._output[3] = float("nan")
        with pytest.raises(EngineError, match="not numbers"):
            list(scorer.generate([[1]], 2, _ends))
