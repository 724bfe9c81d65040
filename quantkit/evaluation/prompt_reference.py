"""What variants' answers are compared with: the source's own, and its distributions along them.

Like ``reference.py``, it keeps final hidden states, not logits, and finds the output layer in the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.errors import EvaluationError
from quantkit.evaluation.prompt_file import Prompts
from quantkit.evaluation.reference import OfSource, computed_by, tensor_of
from quantkit.models.checkpoint import Checkpoint
from quantkit.models.engine_config import EngineConfig
from quantkit.system.files import replacing, sha256_json
from quantkit.system.progress import track

if TYPE_CHECKING:
    from quantkit.engines.base import LanguageModel

_VERSION = 2
"""Raised when what is stored changes: it is part of the key."""


@dataclass(frozen=True)
class ReferenceAnswers(OfSource):
    """The source's greedy answers, and its next-token distribution at each of their tokens.

    ``answers[i]`` of prompt i; ``hidden[i]``: ``(len(answers[i]), hidden)``; ``output``:
    ``(vocabulary, hidden)``, both float32. ``source``: digest of the source's files; ``engine``:
    what computed it.
    """

    source: str
    engine: EngineConfig
    prompts: Prompts
    answers: tuple[tuple[int, ...], ...]
    hidden: tuple[torch.Tensor, ...]
    output: torch.Tensor

    @classmethod
    def build(cls, checkpoint: Checkpoint, prompts: Prompts, cache_dir: Path) -> ReferenceAnswers:
        """Let the source answer once; found again in ``cache_dir`` by the hash of all that it
        depends on.

        Raise EvaluationError where the source itself gives non-finite values.
        """
        source, engine, device = computed_by(checkpoint)
        key = sha256_json([_VERSION, source, str(engine), device, prompts.protocol()])
        path = cache_dir / f"answers-{key[:16]}.safetensors"
        if not path.is_file():
            _compute(checkpoint, prompts, path)
        with safe_open(path, framework="pt") as file:
            lengths = file.get_tensor("lengths").tolist()
            ids = file.get_tensor("answers").tolist()
            hidden = file.get_tensor("hidden").split(lengths)
            name = (file.metadata() or {}).get("output")
            output = checkpoint.read(name) if name else file.get_tensor("output")
        ends = pairwise(accumulate(lengths, initial=0))
        answers = tuple(tuple(ids[start:stop]) for start, stop in ends)
        return cls(source, engine, prompts, answers, hidden, output.float())

    def logits(self, prompt: int) -> torch.Tensor:
        """``(tokens of the answer, vocabulary) float32`` of one prompt."""
        return self.hidden[prompt] @ self.output.T


def answer(model: LanguageModel, prompts: Prompts, what: str) -> list[tuple[int, ...]]:
    """The greedy answer to each prompt, with the id that ends it."""
    order = in_order(prompts)
    asked = [prompts.entries[i].ids for i in order]
    found = model.generate(asked, prompts.max_tokens, prompts.ended)
    answers: list[tuple[int, ...]] = [()] * len(order)
    for i, ids in zip(order, track(found, f"{what}: answers", len(order)), strict=True):
        answers[i] = tuple(ids)
    return answers


def in_order(prompts: Prompts) -> list[int]:
    """Prompts that begin alike side by side: an engine computes their beginning once."""
    return sorted(range(len(prompts.entries)), key=lambda i: prompts.entries[i].ids)


def along(
    prompts: Prompts, answers: tuple[tuple[int, ...], ...], order: list[int]
) -> tuple[list[tuple[int, ...]], list[int]]:
    """What a model reads to be asked at each token of the answers, and from which position on."""
    ids = [prompts.entries[i].ids for i in order]
    inputs = [(*before, *answers[i][:-1]) for i, before in zip(order, ids, strict=True)]
    return inputs, [len(before) - 1 for before in ids]


def _compute(checkpoint: Checkpoint, prompts: Prompts, path: Path) -> None:
    from quantkit.engines.transformers import TransformersScorer

    with TransformersScorer(checkpoint, prompts.context) as scorer:
        answers = tuple(answer(scorer, prompts, "reference"))
        order = in_order(prompts)
        states = scorer.hidden_states(*along(prompts, answers, order))
        tracked: Iterator[torch.Tensor] = track(states, "reference: prompts", len(order))
        # Cloned: they are views of a batch, prompts and all.
        by_prompt = {i: rows.clone() for i, rows in zip(order, tracked, strict=True)}
        output = scorer.output_weight
    hidden = torch.cat([by_prompt[i] for i in range(len(order))])
    bad = int((~hidden.isfinite().all(-1)).sum())
    if bad or not output.isfinite().all():
        raise EvaluationError(
            f"{checkpoint.path}: the reference's own logits are not finite ({bad} of {len(hidden)} "
            "positions of its answers); nothing can be compared with it"
        )
    tensors = {
        "answers": torch.tensor([id_ for ids in answers for id_ in ids], dtype=torch.int32),
        "lengths": torch.tensor([len(ids) for ids in answers], dtype=torch.int32),
        "hidden": hidden,
    }
    name = tensor_of(checkpoint, output)
    if name is None:
        tensors["output"] = output.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"output": name} if name else None)
