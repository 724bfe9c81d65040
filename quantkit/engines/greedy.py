"""Greedy answers: the likeliest token, again and again, for several prompts side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from quantkit.errors import EngineError

if TYPE_CHECKING:
    import torch


class Session(Protocol):
    """A model that goes on writing after several prompts at the same time."""

    def start(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read the prompts; the logits that follow each, ``(prompts, vocabulary)``."""
        ...

    def step(self, prompts: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Add one token to each of these prompts, the only ones still asked for; the logits that
        follow, ``(prompts, vocabulary)``."""
        ...


def write(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    ends: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    """The answers to a batch of prompts; see ``LanguageModel.generate``.

    Of tokens that are equally likely the lowest is taken. Raise EngineError for logits that are
    not numbers.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    writing = list(range(len(prompts))) if max_tokens > 0 else []
    logits = session.start(prompts) if writing else None
    while logits is not None:
        if logits.isnan().any():
            raise EngineError("logits that are not numbers; the model is damaged")
        for i, token in zip(writing, logits.argmax(-1).tolist(), strict=True):
            answers[i].append(token)
        done = {i for i in writing if ends(answers[i])}
        writing = [i for i in writing if i not in done and len(answers[i]) < max_tokens]
        logits = session.step(writing, [answers[i][-1] for i in writing]) if writing else None
    return answers


def batches(
    prompts: Sequence[Sequence[int]], max_tokens: int, most: int, tokens: int
) -> Iterator[Sequence[Sequence[int]]]:
    """Neighbours that are answered together: ``most`` at a time, and no more than fit in
    ``tokens`` once padded and answered."""
    at = 0
    while at < len(prompts):
        count, longest = 1, len(prompts[at])
        while at + count < len(prompts) and count < most:
            longest = max(longest, len(prompts[at + count]))
            if (longest + max_tokens) * (count + 1) > tokens:
                break
            count += 1
        yield prompts[at : at + count]
        at += count


def check_lengths(
    engine: str, prompts: Sequence[Sequence[int]], max_tokens: int, context: int
) -> None:
    """Raise EngineError where a prompt is empty, or leaves its answer no room in the context."""
    for prompt in prompts:
        if not prompt:
            raise EngineError(f"{engine}: an empty prompt; expected at least one token, e.g. BOS")
        if len(prompt) + max_tokens > context:
            raise EngineError(
                f"{engine}: a prompt of {len(prompt)} tokens and an answer of up to {max_tokens} "
                f"do not fit in the {context} that the model was opened for"
            )
